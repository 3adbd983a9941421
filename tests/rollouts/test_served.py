"""The served generator against a stand-in server without faults: what it asks, in which order, and what it gives."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from policies import QUICK, SAMPLING, TinyPolicy, answered, generator_of, tiny_questions
from stand_in_server import ALWAYS, StandIn, stand_in
from tiny import VOCAB_SIZE

from uft_ds.errors import CheckFailed, Stopped, UserError
from uft_ds.host.web import Reply
from uft_ds.rollouts import server as server_module
from uft_ds.rollouts.adapter_versions import Adapters, version_name
from uft_ds.rollouts.answers import Answer, PolicyVersion, Sampling
from uft_ds.rollouts.gate import RESPONSE_NATS, check_served
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.rollouts.server import Client, Refused, Server

COMPLETIONS, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def policy(tiny_qwen2: Path) -> TinyPolicy:
    return TinyPolicy(tiny_qwen2)


@pytest.fixture
def server(tiny_qwen2: Path) -> Iterator[StandIn]:
    with stand_in(tiny_qwen2) as running:
        yield running


def test_three_versions_are_served_as_they_are_trained(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Of each version, served log-probs equal PEFT's own to rounding, and not those of the version before."""
    generator, questions = generator_of(server.url, policy, tmp_path), tiny_questions()
    before = None
    for step in range(3):
        version, tensors = policy.version(step)
        generator.publish(version, tensors)
        found = generator.answer(questions)
        own, served, tokens = policy.own(tensors, answered(questions, found))
        gap = check_served(own, served, tokens, dtype=torch.float32)
        assert gap.worst < 2e-5
        assert abs(gap.mean) < 1e-5
        if before is not None:
            with pytest.raises(CheckFailed):
                check_served(policy.own(before, answered(questions, found))[0], served, tokens, dtype=torch.float32)
        before = tensors


def test_answers_are_whole_and_belong_to_their_seeds(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Each question has its number of answers, of the tokens of its own seeds; the same call gives the same again."""
    generator, questions = generator_of(server.url, policy, tmp_path), tiny_questions(5, answers=3)
    generator.publish(*policy.version(1))
    found = generator.answer(questions)
    assert [len(answers) for answers in found] == [3] * 5  # type: ignore[arg-type]
    flat = [answer for _, answer in answered(questions, found)]
    assert len({answer.token_ids for answer in flat}) == 15
    assert {answer.ended for answer in flat} == {True, False}
    for answer in flat:
        assert answer.ended == (answer.token_ids[-1] in SAMPLING.stop_token_ids)
        assert answer.ended or len(answer.token_ids) == SAMPLING.max_new_tokens
    assert generator.answer(questions) == found
    assert generator.answer(questions[::-1]) == found[::-1]


def test_everything_that_answers_depend_on_is_asked_for(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """No request leaves temperature, top_p, top_k, penalties or stop tokens to the server, and none asks for text."""
    generator, questions = generator_of(server.url, policy, tmp_path), tiny_questions()
    generator.publish(*policy.version(1))
    generator.answer(questions)
    bodies = server.bodies(COMPLETIONS)[1:]  # after the probe
    assert sorted(body["seed"] for body in bodies) == sorted(seed for one in questions for seed in one.seeds)
    for body in bodies:
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, -1, 0.0)
        assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
        assert body["stop_token_ids"] == list(SAMPLING.stop_token_ids)
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        assert body["logprobs"] == 0
        assert body["cache_salt"] == body["model"]
        assert tuple(body["prompt"]) in {one.token_ids for one in questions}
    assert server.most_at_once <= QUICK.concurrency


def test_a_version_has_a_name_a_path_and_a_salt_of_its_own(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """No two versions share what a server keeps prefixes by, the old name is unloaded, and two folders are kept."""
    generator = generator_of(server.url, policy, tmp_path)
    versions = [policy.version(step) for step in (0, 1, 2, 3)]
    for version, tensors in versions:
        generator.publish(version, tensors)
        generator.answer(tiny_questions(1))
    loads = server.bodies(LOAD)
    for of_each in (
        [body["lora_name"] for body in loads],
        [body["lora_path"] for body in loads],
        list(dict.fromkeys(body["cache_salt"] for body in server.bodies(COMPLETIONS))),
    ):
        assert len(of_each) == len(set(of_each)) == 4
    assert all(Path(body["lora_path"]).is_absolute() for body in loads)
    assert all(body["lora_name"].startswith("uft-toy-run-00000") for body in loads)
    assert list(server.adapters) == [loads[-1]["lora_name"]]
    assert [body["lora_name"] for body in server.bodies(UNLOAD)] == [body["lora_name"] for body in loads[:-1]]
    kept = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert kept == sorted(Path(body["lora_path"]).name for body in loads[-2:])


def test_nothing_is_under_way_at_a_swap(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """In the order of what the server was asked, all answers of a version lie between its load and the next one."""
    generator = generator_of(server.url, policy, tmp_path)
    for step in range(3):
        generator.publish(*policy.version(step))
        generator.answer(tiny_questions())
    current = ""
    for route, body in server.asked:
        if route == LOAD:
            current = body["lora_name"]
        if route == COMPLETIONS:
            assert body["model"] == current
    assert current


def test_the_same_tensors_with_another_alpha_are_another_version(policy: TinyPolicy, tmp_path: Path) -> None:
    """The name of a version depends on the config: a server would answer by what it has under an equal name."""
    other = json.dumps(json.loads(policy.config) | {"lora_alpha": 16}).encode()
    version = PolicyVersion(3, "ab" * 32)
    assert version_name(version, policy.config) != version_name(version, other)
    assert version_name(version, policy.config).startswith("000003-")


def test_a_restart_of_the_run_takes_the_name_that_is_there(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """A second process of the run publishes the same version again; what other versions the first left is unloaded."""
    first = generator_of(server.url, policy, tmp_path)
    first.publish(*policy.version(1))
    first.publish(*policy.version(2))
    found = first.answer(tiny_questions())
    again = generator_of(server.url, policy, tmp_path)
    again.publish(*policy.version(2))
    assert again.answer(tiny_questions()) == found
    back = generator_of(server.url, policy, tmp_path)
    back.publish(*policy.version(1))
    assert [name.split("-")[3] for name in server.adapters] == ["000001"]
    back.close()
    assert not server.adapters


def test_an_equal_name_from_another_folder_is_refused(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Two runs of one name on one server would answer by each other's adapters."""
    generator_of(server.url, policy, tmp_path / "one").publish(*policy.version(1))
    with pytest.raises(CheckFailed, match="another run of this name"):
        generator_of(server.url, policy, tmp_path / "two").publish(*policy.version(1))


def test_another_form_than_before_is_refused(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """A layer that was there in the first version must be there in all: a gather may have missed it."""
    generator = generator_of(server.url, policy, tmp_path)
    generator.publish(*policy.version(1))
    version, tensors = policy.version(2)
    fewer = {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp.up_proj." not in name}
    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj"):
        generator.publish(version, fewer)


def test_the_identity_says_who_answers(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Version, model, sampling and the kind of log-probs, as plain JSON values, asked once."""
    generator = generator_of(server.url, policy, tmp_path)
    identity = generator.identity()
    assert json.loads(json.dumps(identity)) == {
        "generator": "vllm",
        "version": "0.0.stand-in",
        "model": "base",
        "dtype": None,
        "logprobs": "raw",
        "sampling": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 8,
            "stop_token_ids": sorted(SAMPLING.stop_token_ids),
        },
    }
    asked = len(server.asked)
    assert generator.identity() == identity
    assert len(server.asked) == asked


@pytest.mark.parametrize("is_raw", [True, False])
def test_log_probs_after_temperature_are_not_taken_for_the_policys(
    policy: TinyPolicy, server: StandIn, tmp_path: Path, is_raw: bool
) -> None:
    """At temperature 0.7 a server that gives raw log-probs agrees with PEFT's; one that does not is refused."""
    server.is_raw = is_raw
    sampling = Sampling(0.7, 0.9, 8, SAMPLING.stop_token_ids)
    generator, questions = generator_of(server.url, policy, tmp_path, sampling=sampling), tiny_questions()
    version, tensors = policy.version(1)
    if not is_raw:
        with pytest.raises(CheckFailed, match="processed_logprobs"):
            generator.publish(version, tensors)
        return
    generator.publish(version, tensors)
    own, served, tokens = policy.own(tensors, answered(questions, generator.answer(questions)))
    assert check_served(own, served, tokens, dtype=torch.float32).worst < 2e-5


def test_a_server_in_bfloat16_passes_the_gate_of_bfloat16(tiny_qwen2: Path, policy: TinyPolicy, tmp_path: Path) -> None:
    """Its rounding is far beyond float32's bound and within bfloat16's, against our own log-probs in float32."""
    questions = tiny_questions(8)
    version, tensors = policy.version(1)
    with stand_in(tiny_qwen2, dtype=torch.bfloat16) as server:
        generator = generator_of(server.url, policy, tmp_path)
        generator.publish(version, tensors)
        found = generator.answer(questions)
    own, served, tokens = policy.own(tensors, answered(questions, found))
    gap = check_served(own, served, tokens, dtype=torch.bfloat16)
    assert RESPONSE_NATS[torch.float32] * 10 < gap.worst
    with pytest.raises(CheckFailed):
        check_served(own, served, tokens, dtype=torch.float32)


def test_a_stop_ends_the_wait_at_once(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """What is under way is cut off, not waited for, and the exception is the caller's own."""
    server.slow_seconds = 30.0
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if server.faults.get("slow") == 100 - QUICK.concurrency:
            raise Stopped("by a test")

    generator = generator_of(server.url, policy, tmp_path, stop=stop)
    generator.publish(*policy.version(1))
    server.faults["slow"] = 100
    with pytest.raises(Stopped, match="by a test"):
        generator.answer(tiny_questions())
    assert calls > 2


@pytest.mark.parametrize("fault", ["slow_load", "slow", "hangs"])
def test_a_stop_is_heard_during_a_publication(policy: TinyPolicy, server: StandIn, tmp_path: Path, fault: str) -> None:
    """While the server loads, while it answers the probe, and while it says nothing: within a second, not by its
    limit, and the connection is cut."""
    asked = threading.Event()

    def stop() -> None:
        if asked.is_set() and server.now > 0:
            raise Stopped("by a test")

    server.slow_seconds = 3.0
    generator = generator_of(server.url, policy, tmp_path, stop=stop)
    generator.publish(*policy.version(1))
    server.faults[fault] = ALWAYS
    asked.set()
    started = time.monotonic()
    with pytest.raises(Stopped, match="by a test"):
        generator.publish(*policy.version(2))
    assert time.monotonic() - started < 2.0
    server.faults.clear()


@pytest.mark.parametrize("key", ["", "sk-secret\n", "sk-secret\u00e9", "sk-secret\x7f"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    """Before it is sent, and without being said: the error of the header would show it."""
    with pytest.raises(UserError) as raised:
        Client(Server("http://127.0.0.1:1", key=key))
    assert "secret" not in str(raised.value)


def test_a_key_in_a_refusal_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor half of it, where the server's words are shortened."""
    body = json.dumps({"error": "x" * 195 + " sk-secret"}).encode()
    monkeypatch.setattr(server_module, "exchange", lambda *args, **kwargs: Reply(400, body))
    with pytest.raises(Refused) as raised:
        Client(Server("http://127.0.0.1:1", key="sk-secret")).unload("x")
    assert "sk" not in str(raised.value)


def test_a_key_is_sent_and_never_said(policy: TinyPolicy, tmp_path: Path) -> None:
    """Neither the server's representation nor an error holds it."""
    server = Server("http://127.0.0.1:1", key="sk-secret")
    assert "secret" not in repr(server)
    generator = ServedGenerator(
        server,
        SAMPLING,
        Adapters(tmp_path, policy.config, "r"),
        Limits(1, 1.0, 0.0),
        vocab_size=VOCAB_SIZE,
        stop=lambda: None,
        on_event=lambda line: None,
    )
    with pytest.raises(CheckFailed) as raised:
        generator.identity()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["ftp://h", "h:8000", "http://h/v1?a=b", "http://u:p@h", "http://", "http://h h"])
def test_a_url_that_cannot_be_asked_is_refused(policy: TinyPolicy, tmp_path: Path, url: str) -> None:
    """Before anything is asked."""
    with pytest.raises(UserError, match="generator"):
        generator_of(url, policy, tmp_path)


def test_answers_hold_the_log_probs_of_their_tokens(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Token by token, against PEFT's forward in float64."""
    generator, questions = generator_of(server.url, policy, tmp_path), tiny_questions(1, answers=1)
    version, tensors = policy.version(1)
    generator.publish(version, tensors)
    ((_, answer),) = answered(questions, generator.answer(questions))
    policy.own(tensors, [(questions[0], answer)])  # puts the version into PEFT's model
    row = torch.tensor([questions[0].token_ids + answer.token_ids])
    model = policy.model.double()
    try:
        with torch.no_grad():
            truth = model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])
    finally:
        policy.model.float()
    assert isinstance(answer, Answer)
    for one, other in zip(answer.logps or (), truth[-len(answer.token_ids) :, 0].tolist(), strict=True):
        assert math.isclose(one, other, abs_tol=2e-5)
