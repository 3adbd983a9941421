"""Before the first step: log-ratios in lockstep, which must be 0, and to a reference of another forward or packing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_check.models import answers, families, random_policy, sequences
from gpu_check.report import Place, Report
from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.known.cache import STORED_ROUNDING_NATS
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import logps_of
from uft_ds.training.determinism import make_deterministic
from uft_ds.training.evaluate import SPOT_CHECK_NATS

FAMILIES = ("llama", "mistral, window", "gemma2, capped")
ROUNDS = 3
"""Forwards of the same row, to see whether one differs from the next."""


def run(report: Report, place: Place) -> None:
    make_deterministic()  # as runs do by default
    lengths = (9, 30, 14, 5, 26, 11) if place.toy else (700, 1500, 333, 64, 1900, 511)
    chosen = families(toy=place.toy)
    for family in FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            policy = random_policy(chosen[family], place.device, dtype=dtype, attention="packed", recompute=True)
            name = f"{family} {str(dtype).removeprefix('torch.')}"
            model = UFTModel(policy, reference_mode="lockstep")
            _lockstep(report, name, model, place, sequences(*lengths), share=False)
            _lockstep(report, f"{name} shared", model, place, answers(lengths[2], *lengths[2:5]), share=True)
            _stored(report, name, model, place, sequences(*lengths), dtype)
    policy = random_policy(chosen["llama"], place.device, dtype=torch.bfloat16, attention="packed")
    separate = UFTModel(policy, reference_mode="separate")
    ratios_R = ratios(separate, sequences(*lengths), place, share=False)
    report.fact("separate forwards: largest |log-ratio|, nats", float(ratios_R.abs().max()))


def _lockstep(report: Report, name: str, model: UFTModel, place: Place, rows: list[Sequence], *, share: bool) -> None:
    largest = 0.0
    for _ in range(ROUNDS):
        of_round = float(ratios(model, rows, place, share=share).abs().max())
        largest = of_round if math.isnan(of_round) else max(largest, of_round)
    report.row("lockstep, before the first step", case=name, largest_log_ratio=largest)
    report.demand(largest == 0.0, f"{name}: a log-ratio before the first step is {largest:.3g} nats, and not 0")


def ratios(model: UFTModel, rows: list[Sequence], place: Place, *, share: bool) -> Tensor:
    """Log-ratios of all responses, forwarded as training does, with the policy's graph: [responses], nats."""
    batch = micro_batch(rows, share_prompts=share).to(place.device)
    streams = [model.streams["policy"], model.streams["reference"]]
    logps = logps_of(model(batch, streams, with_statistics=True), batch)
    return (logps["policy"] - logps["reference"]).detach()


def _stored(report: Report, name: str, model: UFTModel, place: Place, rows: list[Sequence], dtype: torch.dtype) -> None:
    """A reference stored from one packing beside the policy in another one."""
    stored_R = torch.cat([reference(model, [row], place) for row in rows])
    largest, scaled = 0.0, 0.0
    for order in (rows, rows[::-1]):
        batch = micro_batch(order).to(place.device)
        policy_R = logps_of(model(batch, [model.streams["policy"]]), batch)["policy"].detach()
        known_R = stored_R if order is rows else stored_R.flip(0)
        roots_R = torch.tensor([row.responses[0].num_tokens ** 0.5 for row in order], device=place.device)
        difference_R = (policy_R - known_R).abs()
        largest = max(largest, float(difference_R.max()))
        scaled = max(scaled, float((difference_R / roots_R).max()))
    report.row(
        "a reference stored from another packing", case=name, largest_log_ratio=largest, a_root_token=scaled,
        assumed=STORED_ROUNDING_NATS[dtype], refused_from=SPOT_CHECK_NATS[dtype],
    )  # fmt: skip
    report.demand(
        scaled <= SPOT_CHECK_NATS[dtype],
        f"{name}: a stored reference is {scaled:.2g} nats a root token off: runs refuse it, and no packing is the same",
    )


def reference(model: UFTModel, rows: list[Sequence], place: Place) -> Tensor:
    batch = micro_batch(rows).to(place.device)
    with torch.no_grad():
        return logps_of(model(batch, [model.streams["reference"]]), batch)["reference"]
