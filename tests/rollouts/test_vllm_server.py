"""A real vLLM server against Hugging Face and PEFT, by its address in UFT_TEST_VLLM; without it, not collected.

The server must be started on the folder of a model that this machine has too, with nothing else using it:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve FOLDER --dtype float32 --enable-lora --max-lora-rank 16 \
        --max-loras 1 --max-cpu-loras 2 --generation-config vllm
    UFT_TEST_VLLM=http://127.0.0.1:8000 pytest tests/rollouts/test_vllm_server.py -s

UFT_TEST_VLLM_MODEL names the folder where the server does not; UFT_TEST_VLLM_DTYPE is bfloat16 for such a server.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import TinyPolicy, answered
from transformers import AutoTokenizer

from uft_ds.errors import CheckFailed
from uft_ds.rollouts.adapter_versions import Adapters
from uft_ds.rollouts.answers import Question, Sampling
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
    return [Question(tuple(row), 4, seed=number) for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def sampling(folder: Path) -> Sampling:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return Sampling(1.0, 1.0, 16, (tokenizer.eos_token_id,))


def vocabulary(policy: TinyPolicy) -> int:
    return int(policy.model.get_input_embeddings().weight.shape[0])


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
    generator = ServedGenerator(
        server,
        sampling,
        Adapters(tmp_path / "adapters", policy.config, "tested"),
        Limits(),
        vocab_size=vocabulary(policy),
        stop=lambda: None,
        on_event=print,
    )
    print(dict(generator.identity()))
    before = None
    try:
        for step in range(3):
            version, tensors = policy.version(step)
            generator.publish(version, tensors)
            asked = answered(questions, generator.answer(questions))
            own, served, tokens = policy.own(tensors, asked)
            gap = check_served(own, served, tokens, dtype=dtype)
            print(
                f"version {step}: worst {gap.worst:.3g} nats, mean {gap.mean:+.3g} a token, {int(tokens.sum())} tokens"
            )
            if before is not None and dtype == torch.float32:
                with pytest.raises(CheckFailed):
                    check_served(policy.own(before, asked)[0], served, tokens, dtype=dtype)
            before = tensors
    finally:
        generator.close()
