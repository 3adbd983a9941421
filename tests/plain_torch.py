"""The definition of a run that trains all parameters: float64, two copies of Hugging Face's model, torch's AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.recipe.settings import Settings
from uft_ds.training.schedule import learning_rate

LogRatios = Callable[[Sequence], Tensor]
"""[responses], float64, with the policy's graph."""
Terms = Callable[[Tensor, Tensor], Tensor]
"""([responses] rewards, [responses] scores) -> [responses], the terms of the loss."""


def squared_error(rewards_R: Tensor, scores_R: Tensor) -> Tensor:
    """UFT's."""
    return (rewards_R.sigmoid() - scores_R).square()


def kto(undesirable_weight: float) -> Terms:
    """KTO's (2402.01306), for labelled responses: 1 - sigma(r - z0) for a good one, 1 - sigma(z0 - r) for a bad one."""

    def terms(rewards_R: Tensor, labels_R: Tensor) -> Tensor:
        good_R = 1 - rewards_R.sigmoid()
        bad_R = undesirable_weight * (1 - (-rewards_R).sigmoid())
        return torch.where(labels_R == 1, good_R, bad_R)

    return terms


def kl_of(step: Step, log_ratios: LogRatios) -> float:
    """KTO's estimate, in nats: each prompt with the next answer to another prompt; 0 if their mean is below it."""
    responses = [(sequence, response) for sequence in step.sequences for response in sequence.responses]
    prompts = [tuple(sequence.token_ids_T[: response.start].tolist()) for sequence, response in responses]
    longest, found = max(len(sequence.token_ids_T) for sequence, _ in responses), []
    for place, (sequence, own) in enumerate(responses):
        first = place + prompts.count(prompts[place])
        others = [i % len(responses) for i in range(first, first + len(responses))]
        other, of_other = responses[next(i for i in others if prompts[i] != prompts[place])]
        tokens = np.concatenate([sequence.token_ids_T[: own.start], other.token_ids_T[of_other.start : of_other.end]])
        if len(tokens) <= longest:
            joined = Response(own.start, len(tokens), 1.0, "score", "")
            found.append(float(log_ratios(Sequence(tokens, (joined,)))))
    return max(0.0, sum(found) / len(found))


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
    terms: Terms = squared_error,
) -> tuple[dict[str, Tensor], list[float]]:
    """A pointwise loss with a beta of 0.1, each sequence forwarded alone; the parameters in the end, and the losses.

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
            total = total + terms(rewards_R, scores_R).sum()
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
