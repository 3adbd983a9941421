"""A real vLLM server against Hugging Face and PEFT, by its address in UFT_TEST_VLLM; without it, not collected.

The server must be started on the folder of a model that this machine has too, with nothing else using it:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve FOLDER --dtype float32 --enable-lora --max-lora-rank 16 \
        --max-loras 1 --max-cpu-loras 2 --generation-config vllm
    UFT_TEST_VLLM=http://127.0.0.1:8000 pytest tests/rollouts/test_vllm_server.py -s

UFT_TEST_VLLM_MODEL names the folder where the server does not; UFT_TEST_VLLM_DTYPE is bfloat16 for such a server.
"""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import TinyPolicy, answered
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from uft_ds.errors import CheckFailed, Stopped
from uft_ds.rollouts.adapter_versions import Adapters
from uft_ds.rollouts.answers import Answer, Question, Sampling
from uft_ds.rollouts.asking import Job, RequestForm, Round
from uft_ds.rollouts.examine import Needed, examine_server, refuse_problems
from uft_ds.rollouts.gate import check_served
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.rollouts.server import Client, Server

pytestmark = pytest.mark.long

PROMPTS = ("What is the capital of France?", "Name a prime above 10.", "Say hello in German.")


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(os.environ["UFT_TEST_VLLM"])


@pytest.fixture(scope="module")
def folder(server: Server) -> Path:
    return Path(os.environ.get("UFT_TEST_VLLM_MODEL") or Client(server).base().root or "")


@pytest.fixture(scope="module")
def policy(folder: Path) -> TinyPolicy:
    return TinyPolicy(folder)


@pytest.fixture(scope="module")
def dtype() -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[os.environ.get("UFT_TEST_VLLM_DTYPE", "float32")]


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for text in PROMPTS
    ]
    # Longer than a block of the prefix cache, which has at most 128 tokens, so that versions could share prefixes.
    long = rows[0] * (150 // len(rows[0]) + 1)
    return [
        *(Question(tuple(row), 4, seed=number) for number, row in enumerate(rows)),
        Question(tuple(long), 2, seed=9),
    ]


@pytest.fixture(scope="module")
def sampling(folder: Path) -> Sampling:
    """Of all tokens every eighth ends an answer, so that some end and some are cut."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return Sampling(1.0, 1.0, 16, (tokenizer.eos_token_id, *range(1000, len(tokenizer), 8)))


def vocabulary(policy: TinyPolicy) -> int:
    return int(policy.model.get_input_embeddings().weight.shape[0])


def generator_of(
    server: Server, policy: TinyPolicy, sampling: Sampling, folder: Path, stop: Callable[[], None] = lambda: None
) -> ServedGenerator:
    adapters = Adapters(folder / "adapters", policy.config, "tested")
    return ServedGenerator(
        server, sampling, adapters, Limits(), vocab_size=vocabulary(policy), stop=stop, on_event=print
    )


def test_the_examination_passes(
    server: Server, policy: TinyPolicy, sampling: Sampling, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A server that was started as the examination says has no problem."""
    needed = Needed(
        sampling=sampling,
        adapters=Adapters(tmp_path / "adapters", policy.config, "examined"),
        shapes={name: tuple(tensor.shape) for name, tensor in policy.version(0)[1].items()},
        vocab_size=vocabulary(policy),
        tokens=256,
        dtype=dtype,
    )
    examined = examine_server(server, needed)
    for one in examined.findings:
        print(f"{one.name}: {one.state}: {one.found}")
    refuse_problems(examined)


def test_three_versions(
    server: Server,
    policy: TinyPolicy,
    questions: list[Question],
    sampling: Sampling,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    """Served and own log-probs agree for each version; in float32 not with those of the version before."""
    generator = generator_of(server, policy, sampling, tmp_path)
    print({name: value for name, value in generator.identity().items() if name != "sampling"})
    before = None
    try:
        for step in range(3):
            version, tensors = policy.version(step)
            started = time.monotonic()
            generator.publish(version, tensors)
            seconds = time.monotonic() - started
            asked = answered(questions, generator.answer(questions))
            assert {answer.ended for _, answer in asked} == {True, False}
            own, served, tokens = policy.own(tensors, asked)
            gap = check_served(own, served, tokens, dtype=dtype)
            print(
                f"version {step}: published in {seconds:.2f} s, worst {gap.worst:.3g} nats, mean {gap.mean:+.3g} a "
                f"token, {int(tokens.sum())} tokens"
            )
            if before is not None and dtype == torch.float32:
                with pytest.raises(CheckFailed):
                    check_served(policy.own(before, asked)[0], served, tokens, dtype=dtype)
            before = tensors
    finally:
        generator.close()


def test_a_second_start_takes_the_name_that_is_there(
    server: Server, policy: TinyPolicy, questions: list[Question], sampling: Sampling, tmp_path: Path
) -> None:
    """The server refuses a name that it has with 400, and lists the folder that it is from; another one is refused."""
    first = generator_of(server, policy, sampling, tmp_path)
    first.publish(*policy.version(0))
    first.publish(*policy.version(1))
    found = first.answer(questions[:1])
    again = generator_of(server, policy, sampling, tmp_path)
    again.publish(*policy.version(1))
    assert [one.token_ids for _, one in answered(questions[:1], again.answer(questions[:1]))] == [
        one.token_ids for _, one in answered(questions[:1], found)
    ]
    with pytest.raises(CheckFailed, match="another run of this name"):
        generator_of(server, policy, sampling, tmp_path / "other").publish(*policy.version(1))
    again.close()
    assert not [one.name for one in Client(server).models() if "-tested-" in one.name]


def without_first_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not any(f".layers.{n}." in name for n in range(10))}


WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "half the scale": lambda tensors: {n: t * (0.5 if "lora_B" in n else 1.0) for n, t in tensors.items()},
    "a third of the layers missing": without_first_layers,
    "the base": lambda tensors: {n: t * (0.0 if "lora_B" in n else 1.0) for n, t in tensors.items()},
    "one layer missing": lambda tensors: {n: t for n, t in tensors.items() if ".layers.5.mlp.down_proj." not in n},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_gate_sees_a_wrong_adapter(
    server: Server,
    policy: TinyPolicy,
    questions: list[Question],
    sampling: Sampling,
    tmp_path: Path,
    dtype: torch.dtype,
    wrong: str,
) -> None:
    """The server takes it with 200 and answers by it. In bfloat16 a fault may hide; its size is printed."""
    version, tensors = policy.version(0)
    path, name = tmp_path / "wrong", f"uft-wrong-{version.digest[:8]}-{os.getpid()}-{list(WRONG).index(wrong)}"
    path.mkdir()
    (path / "adapter_config.json").write_bytes(policy.config)
    save_file({n: t.contiguous() for n, t in WRONG[wrong](tensors).items()}, path / "adapter_model.safetensors")
    client = Client(server)
    client.load(name, path)
    try:
        jobs = [Job(k, one.token_ids, seed) for k, one in enumerate(questions[:3]) for seed in one.seeds]
        form = RequestForm(name, sampling, vocabulary(policy), 600.0)
        found = Round(client, form).results(jobs, 16, lambda: None)
    finally:
        client.unload(name)
    asked = [(questions[job.question], one) for job, one in zip(jobs, found, strict=True) if isinstance(one, Answer)]
    assert len(asked) == len(jobs)
    own, served, tokens = policy.own(tensors, asked)
    apart = (served - own).double()
    print(f"{wrong}: {float(apart.abs().max()):.3g} nats, mean {float(apart.sum() / tokens.sum()):+.3g} a token")
    if dtype == torch.float32:
        with pytest.raises(CheckFailed, match="not the one that is trained"):
            check_served(own, served, tokens, dtype=dtype)


def running(server: Server) -> int:
    """Requests that the server works on or has waiting, as it counts them."""
    with urllib.request.urlopen(f"{Client(server).url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    counts = [line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
    assert counts
    return int(sum(float(line.rpartition(" ")[2]) for line in counts))


def test_a_stop_ends_the_requests_at_the_server(
    server: Server, policy: TinyPolicy, questions: list[Question], tmp_path: Path
) -> None:
    """Connections are cut, and the server leaves what it was working on, long before it would have been done. It counts
    its requests anew every ten seconds when it is at rest."""
    asked = threading.Event()

    def stop() -> None:
        if asked.is_set() and running(server) > 0:
            raise Stopped("by a test")

    generator = generator_of(server, policy, Sampling(1.0, 1.0, 400, ()), tmp_path, stop)
    generator.publish(*policy.version(0))
    asked.set()
    with pytest.raises(Stopped):
        generator.answer(questions[:3])
    started = time.monotonic()
    while running(server) > 0:
        assert time.monotonic() - started < 60
        time.sleep(0.2)
    print(f"the server was at rest {time.monotonic() - started:.1f} s after the stop")
    generator.close()
