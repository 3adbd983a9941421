"""The definition of a run that trains all parameters: float64, two copies of Hugging Face's model, torch's AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.recipe.settings import Settings
from uft_ds.training.schedule import learning_rate

LogRatios = Callable[[Sequence], Tensor]
"""[responses], float64, with the policy's graph."""


def logps_of(model: nn.Module, sequence: Sequence) -> Tensor:
    """log pi(y|x) of each response by Hugging Face's own forward of one sequence: [responses], with its graph."""
    batch = micro_batch([sequence])
    logits_TV = model(input_ids=batch.token_ids_T[None], use_cache=False).logits[0]
    logps_NV = logits_TV.index_select(0, batch.predictors_N).log_softmax(dim=-1)
    token_logps_N = logps_NV.gather(1, batch.targets_N[:, None]).squeeze(1)
    return response_logps(token_logps_N, batch.response_of_N, len(batch.responses))


def trained_by_plain_torch(
    settings: Settings,
    steps: Iterable[Step],
    num_steps: int,
    *,
    shift_of: Callable[[Step, LogRatios], float] = lambda step, log_ratios: 0.0,
) -> tuple[dict[str, Tensor], list[float]]:
    """UFT's squared error with a beta of 0.1, each sequence forwarded alone; the parameters in the end, and the losses.

    Args:
        shift_of: what is subtracted from the log-ratios of a step, nats.
    """
    train = settings.train
    model = AutoModelForCausalLM.from_pretrained(settings.model.base, dtype=torch.float64)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=train.betas, weight_decay=train.weight_decay)
    found = []

    def log_ratios(sequence: Sequence) -> Tensor:
        return logps_of(model, sequence) - logps_of(reference, sequence)

    for step in steps:
        optimizer.zero_grad()
        with torch.no_grad():
            shift = shift_of(step, log_ratios)
        total = torch.zeros((), dtype=torch.float64)
        for sequence in step.sequences:
            rewards_R = 0.1 * (log_ratios(sequence) - shift)
            scores_R = torch.tensor([response.score for response in sequence.responses], dtype=torch.float64)
            total = total + (rewards_R.sigmoid() - scores_R).square().sum()
        loss = total / len(step.responses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step.index, num_steps=num_steps, peak=train.lr, warmup=train.warmup, schedule=train.schedule
        )
        optimizer.step()
        found.append(float(loss.detach()))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, found


def assert_moved_alike(found: nn.Module, expected: dict[str, Tensor], start: nn.Module) -> None:
    """Each parameter's movement from the start, to a thousandth of its norm."""
    before = dict(start.named_parameters())
    for name, parameter in found.named_parameters():
        moved = (expected[name] - before[name]).norm()
        assert moved > 0, name
        assert (parameter.double() - expected[name]).norm() <= 1e-3 * moved, name
