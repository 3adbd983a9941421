"""A policy of a tiny model in versions that differ as a training's do, and its own log-probs by PEFT."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tiny import IM_END, VOCAB_SIZE
from torch import Tensor
from transformers import AutoModelForCausalLM

from uft_ds.rollouts.adapter_versions import Adapters
from uft_ds.rollouts.answers import Answer, PolicyVersion, Question, Sampling
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.rollouts.server import Server
from uft_ds.streams.adapters import adapter_config_of, add_adapters

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8, stop_token_ids=(IM_END, *range(40, 70)))
"""Of 259 tokens 31 end an answer, so that some end and some are cut."""
QUICK = Limits(concurrency=4, seconds=20.0, patience_seconds=20.0)
Versioned = tuple[PolicyVersion, dict[str, Tensor]]


def tiny_questions(count: int = 4, answers: int = 2) -> list[Question]:
    draw = torch.Generator().manual_seed(3)
    return [
        Question(
            tuple(torch.randint(70, VOCAB_SIZE, (6 + number,), generator=draw).tolist()), answers, seed=100 + number
        )
        for number in range(count)
    ]


class TinyPolicy:
    """The policy of a model's folder. PEFT holds the adapter; a server sees what is published of it."""

    def __init__(self, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model: Any = add_adapters(base, rank=4, alpha=8.0, targets="all-linear", dtype=torch.float32, seed=1)
        self.config = adapter_config_of(self.model)

    def version(self, step: int) -> Versioned:
        """The adapter after a step: drawn by its number, large enough for log-probs to differ by 0.01 to 1 nats."""
        draw = torch.Generator().manual_seed(step)
        tensors = {
            name: torch.randn(tensor.shape, generator=draw) * (0.05 if "lora_B" in name else 0.1)
            for name, tensor in sorted(get_peft_model_state_dict(self.model).items())
        }
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
        return PolicyVersion(step, digest), tensors

    def own(self, tensors: dict[str, Tensor], asked: list[tuple[Question, Answer]]) -> tuple[Tensor, Tensor, Tensor]:
        """[responses] each: log-probs by PEFT's forward and by the server, summed, and the numbers of tokens."""
        set_peft_model_state_dict(self.model, tensors)
        own, served, tokens = [], [], []
        for question, answer in asked:
            row = torch.tensor([question.token_ids + answer.token_ids])
            with torch.no_grad():
                logps = self.model(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            of_answer = logps.gather(-1, row[0, 1:, None])[len(question.token_ids) - 1 :, 0]
            assert answer.logps is not None
            own.append(of_answer.sum())
            served.append(torch.tensor(answer.logps).sum())
            tokens.append(len(answer.token_ids))
        return torch.stack(own), torch.stack(served), torch.tensor(tokens)


def generator_of(
    url: str,
    policy: TinyPolicy,
    folder: Path,
    *,
    sampling: Sampling = SAMPLING,
    limits: Limits = QUICK,
    stop: Callable[[], None] = lambda: None,
    events: list[str] | None = None,
) -> ServedGenerator:
    on_event = (lambda line: None) if events is None else events.append
    adapters = Adapters(folder / "adapters", policy.config, "toy run")
    return ServedGenerator(Server(url), sampling, adapters, limits, vocab_size=VOCAB_SIZE, stop=stop, on_event=on_event)


def answered(questions: list[Question], found: Any) -> list[tuple[Question, Answer]]:
    """Each answer with its question."""
    return [(question, answer) for question, answers in zip(questions, found, strict=True) for answer in answers]
