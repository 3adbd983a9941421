"""The definition of a run that trains adapters: float64, PEFT on Hugging Face's model, torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from plain_torch import logps_of, squared_error
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from uft_ds.architectures.facts import wraps_a_language_model
from uft_ds.data.mixture import Step
from uft_ds.recipe.settings import Settings
from uft_ds.training.schedule import learning_rate

StepLoss = Callable[[Step, Tensor, Tensor], Tensor]
"""(step, [responses] log-probs with their graph, [responses] log-probs of the reference) -> the loss."""


def uft_loss(step: Step, logps_R: Tensor, reference_R: Tensor) -> Tensor:
    """UFT's squared error with a beta of 0.1."""
    scores_R = torch.tensor([response.score for response in step.responses], dtype=torch.float64)
    return squared_error(0.1 * (logps_R - reference_R), scores_R).mean()


def grpo_loss(step: Step, logps_R: Tensor, reference_R: Tensor) -> Tensor:
    """-A log pi of own answers, A = (s - mean s) / (std s + 1e-4) - 0.05 (l - mean l of the others), and UFT's squared
    error of the other responses with a beta of 0.01."""
    spans = [(sequence, response) for sequence in step.sequences for response in sequence.responses]
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (sequence, response) in enumerate(spans):
        if response.kind == "score":
            groups.setdefault(tuple(sequence.token_ids_T[: response.start].tolist()), []).append(place)
    log_ratios_R = logps_R - reference_R
    scores_R = torch.tensor([response.score for _, response in spans], dtype=torch.float64)
    terms = []
    for members in groups.values():
        scores_K, ratios_K = scores_R[members], log_ratios_R[members].detach()
        of_others_K = (ratios_K.sum() - ratios_K) / (len(members) - 1)
        advantages_K = (scores_K - scores_K.mean()) / (scores_K.std() + 1e-4) - 0.05 * (ratios_K - of_others_K)
        terms.append(-advantages_K * logps_R[members])
    own = {place for members in groups.values() for place in members}
    others = [place for place in range(len(spans)) if place not in own]
    return torch.cat(terms).mean() + squared_error(0.01 * log_ratios_R[others], scores_R[others]).mean()


def trained_by_peft(settings: Settings, steps: Iterable[Step], start: Path, loss_of: StepLoss) -> list[float]:
    """The losses of all steps, each sequence forwarded alone, the reference with the adapters off.

    Args:
        start: the folder of the adapter before the first step.
    """
    config: Any = AutoConfig.from_pretrained(settings.model.base)
    auto = AutoModelForImageTextToText if wraps_a_language_model(config) else AutoModelForCausalLM
    # The grouped products that transformers takes for experts by itself have no float64.
    base = auto.from_pretrained(settings.model.base, dtype=torch.float64, experts_implementation="eager")
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True).double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train, steps, found = settings.train, list(steps), []
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=train.betas, weight_decay=train.weight_decay)
    for step in steps:
        optimizer.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            reference_R = torch.cat([logps_of(model, sequence) for sequence in step.sequences])
        loss = loss_of(step, torch.cat([logps_of(model, sequence) for sequence in step.sequences]), reference_R)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step.index, num_steps=len(steps), peak=train.lr, warmup=train.warmup, schedule=train.schedule
        )
        optimizer.step()
        found.append(float(loss.detach()))
    return found
