"""How faults of a server are caught: how early, how often it is asked again, and what reaches it meanwhile.

That each of them is caught at all is in `test_planted_faults.py`.

    caught by                      faults
    the folder's check          NaN in what is published; a layer that lacks one side; another rank; layers gone missing
    the probe after a load      NaN in the server's memory; another base after a restart
    the reading of a reply      fewer log-probs than ids; log-probs that are none; a finish reason that lies; another
                                prompt, another model, no token
    the gate (float32)          weights of the version before; the base; another scale; layers missing in the server's
                                memory; ids that are not the sampled ones
    waiting, asking again       a cut connection, 5xx, a restart, a slow request
    the end of patience         a server that is gone, that hangs, or that fails on each request

The gate's faults look right in every reply. They are told apart by the trainer's own log-probs alone; in bfloat16 the
bound of one response does not see them (`test_gate.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from policies import TinyPolicy, answered, generator_of, tiny_questions
from stand_in_server import ALWAYS, StandIn, stand_in

from uft_ds.errors import CheckFailed, GeneratorLost, UserError
from uft_ds.rollouts import server as server_module
from uft_ds.rollouts.answers import Unanswered
from uft_ds.rollouts.gate import check_served
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.scoring import pacing


@pytest.fixture(scope="module")
def policy(tiny_qwen2: Path) -> TinyPolicy:
    return TinyPolicy(tiny_qwen2)


@pytest.fixture
def server(tiny_qwen2: Path) -> Iterator[StandIn]:
    with stand_in(tiny_qwen2) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(server_module, "_QUESTION_SECONDS", 1.0)


def published(
    server: StandIn, policy: TinyPolicy, folder: Path, events: list[str] | None = None, **limits: float
) -> ServedGenerator:
    """A generator at version 2, after version 1."""
    chosen = Limits(4, limits.get("seconds", 20.0), limits.get("patience", 20.0))
    generator = generator_of(server.url, policy, folder, limits=chosen, events=events)
    generator.publish(*policy.version(1))
    generator.publish(*policy.version(2))
    return generator


@pytest.mark.parametrize("fault", ["stale", "base", "other_ids"])
def test_the_gate_sees_answers_by_another_policy(
    policy: TinyPolicy, server: StandIn, tmp_path: Path, fault: str
) -> None:
    """Every reply is well-formed, and served and own log-probs differ by far more than rounding."""
    generator, questions = published(server, policy, tmp_path), tiny_questions()
    server.faults[fault] = ALWAYS
    found = generator.answer(questions)
    own, served, tokens = policy.own(policy.version(2)[1], answered(questions, found))
    with pytest.raises(CheckFailed, match="not the one that is trained"):
        check_served(own, served, tokens, dtype=torch.float32)
    one = int(tokens.argmax())  # one response is enough
    with pytest.raises(CheckFailed, match="not the one that is trained"):
        check_served(own[one : one + 1], served[one : one + 1], tokens[one : one + 1], dtype=torch.float32)


def test_nan_in_what_is_published_never_reaches_the_server(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """A server that has loaded NaN is unreliable until it is started again."""
    generator = published(server, policy, tmp_path)
    version, tensors = policy.version(3)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    loads = len(server.bodies("/v1/load_lora_adapter"))
    with pytest.raises(CheckFailed, match="NaN"):
        generator.publish(version, tensors)
    assert len(server.bodies("/v1/load_lora_adapter")) == loads


def test_nan_in_the_servers_memory_is_seen_by_the_probe(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """Before any question is asked."""
    server.faults["nan_adapter"] = ALWAYS
    with pytest.raises(CheckFailed, match="log-prob is nan"):
        published(server, policy, tmp_path)
    assert len(server.bodies("/v1/completions")) == 1


@pytest.mark.parametrize("fault", ["cut", "error_500", "restarts", "aborts"])
def test_a_server_that_fails_for_a_while_is_waited_for(
    policy: TinyPolicy, server: StandIn, tmp_path: Path, fault: str
) -> None:
    """The answers are the same as without the fault, and the user is told of the loss and of the return."""
    events: list[str] = []
    generator, questions = published(server, policy, tmp_path, events), tiny_questions(3, answers=3)
    expected = generator.answer(questions)
    assert not events
    server.faults[fault] = 6
    assert generator.answer(questions) == expected
    assert len(events) == 2
    assert "it is waited for" in events[0]
    assert "answers again" in events[1]


def test_a_server_that_was_started_again_is_given_the_adapter(
    policy: TinyPolicy, server: StandIn, tmp_path: Path
) -> None:
    """Gone for a moment, back on the same port without any adapter: the same version is published again."""
    generator, questions = published(server, policy, tmp_path), tiny_questions()
    expected = generator.answer(questions)
    (name,) = server.adapters
    server.stop()
    threading.Timer(0.3, server.start).start()
    assert generator.answer(questions) == expected
    assert list(server.adapters) == [name]


@pytest.mark.long
@pytest.mark.parametrize("fault", ["gone", "error_500", "restarts", "hangs"])
def test_a_server_without_answers_is_given_up(
    policy: TinyPolicy, server: StandIn, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health alone does not renew the patience. The end names the server, what was found and what to do."""
    generator = published(server, policy, tmp_path, patience=1.0, seconds=0.5)
    if fault == "gone":
        server.stop()
    else:
        server.slow_seconds = 2.0
        server.faults[fault] = ALWAYS
    monkeypatch.setattr(server_module, "_QUESTION_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(GeneratorLost) as raised:
        generator.answer(tiny_questions())
    assert 1.0 <= time.monotonic() - started < 15.0
    assert server.url in str(raised.value)
    assert "--resume" in str(raised.value)
    found = {
        "gone": "no connection",
        "error_500": "EngineCore",
        "restarts": "does not exist",
        "hangs": "no answer within",
    }
    assert found[fault] in str(raised.value)


def test_a_slow_request_is_asked_once_again_with_the_same_seed(
    policy: TinyPolicy, server: StandIn, tmp_path: Path
) -> None:
    """The answer is the one that the first request would have had."""
    generator, questions = published(server, policy, tmp_path, seconds=4.0), tiny_questions()
    expected = generator.answer(questions)
    server.faults["slow"], server.slow_seconds = 1, 8.0
    before = len(server.asked)
    assert generator.answer(questions) == expected
    seeds = [body["seed"] for _, body in server.asked[before:]]
    assert len(seeds) == 9
    assert len(set(seeds)) == 8


@pytest.mark.long
def test_a_question_that_is_always_too_slow_is_unanswered(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """It has no answer at all, with the reason; the others have theirs."""
    generator, questions = published(server, policy, tmp_path, seconds=4.0), tiny_questions()
    expected = generator.answer(questions)
    server.slow_prompt, server.slow_seconds = list(questions[1].token_ids), 8.0
    found = generator.answer(questions)
    assert isinstance(found[1], Unanswered)
    assert "no answer within 4 s, asked 2 times" in found[1].reason
    assert [found[0], *found[2:]] == [expected[0], *expected[2:]]


def test_a_request_that_is_refused_ends_at_once(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """In the server's words, with the lengths that were asked for, and without asking again."""
    generator = published(server, policy, tmp_path)
    server.faults["error_400"] = ALWAYS
    before = len(server.asked)
    with pytest.raises(CheckFailed, match=r"refuses a prompt of \d+ tokens.*maximum context length is 8"):
        generator.answer(tiny_questions())
    assert len(server.asked) - before <= 4


def test_a_server_that_does_not_take_the_adapter_is_given_up_early(
    policy: TinyPolicy, server: StandIn, tmp_path: Path
) -> None:
    """It is well and refuses: after four tries, long before the patience for a lost server ends."""
    server.max_rank = 2
    generator = generator_of(server.url, policy, tmp_path, limits=Limits(patience_seconds=600.0))
    started = time.monotonic()
    with pytest.raises(GeneratorLost, match=r"LoRA rank 4 is greater.*--max-lora-rank"):
        generator.publish(*policy.version(1))
    assert time.monotonic() - started < 10


def test_a_server_without_runtime_adapters_is_named(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """The variable that switches them on."""
    server.takes_adapters = False
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        generator_of(server.url, policy, tmp_path).publish(*policy.version(1))
