"""Packed rows against each sequence alone by the model's own forward: log-probs and the adapters' gradients."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpu_check.models import answers, families, random_policy, sequences
from gpu_check.report import Place, Report
from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.streams import packed_attention
from uft_ds.streams.model import UFTModel
from uft_ds.training.model_check import ALLOWED

ALLOWED_GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the norm of all adapters' gradients. In bfloat16 each layer's rounding is another one in a row of another shape:
0.02 was measured on a CPU."""


def run(report: Report, place: Place) -> None:
    lengths = (5, 17, 8, 33) if place.toy else (37, 300, 128, 511)
    prompt = answers(11, 5, 9, 3) if place.toy else answers(150, 40, 100, 33)
    attentions = ["packed"]
    if place.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        attentions.append("flash_attention_2")
    for family, config in families(toy=place.toy).items():
        for dtype in (torch.bfloat16, torch.float32):
            for attention in attentions:
                if attention == "flash_attention_2" and dtype == torch.float32:
                    continue
                name = f"{family} {str(dtype).removeprefix('torch.')} {attention}"
                try:
                    model = model_with(config, place, dtype, attention)
                    policy: Any = model.policy
                    own = "sdpa" if policy.get_base_model()._supports_sdpa else "eager"
                    models = model, model_with(config, place, dtype, own)
                    _compare(report, name, models, place, sequences(*lengths), dtype, share=False)
                    if model.can_share_prompts:
                        _compare(report, f"{name} shared", models, place, prompt, dtype, share=True)
                except Exception as error:  # noqa: BLE001 - the other families are still of interest
                    report.demand(False, f"{name}: {type(error).__name__}: {str(error)[:300]}")
                gc.collect()


def model_with(config: Any, place: Place, dtype: torch.dtype, attention: str) -> UFTModel:
    policy = random_policy(config, place.device, dtype=dtype, attention=attention, b_std=0.02)
    return UFTModel(policy, reference_mode="separate")


def _compare(
    report: Report,
    name: str,
    models: tuple[UFTModel, UFTModel],
    place: Place,
    rows: list[Sequence],
    dtype: torch.dtype,
    *,
    share: bool,
) -> None:
    """models: the one that is tried, and one of the same weights with transformers' own attention."""
    model, other = models
    with counted() as calls:
        packed_N, packed_grad = forwarded(model, rows, place, share=share)
    alone_N = torch.cat([own_logps(model, row, place) for row in rows])
    alone_grad = torch.stack([forwarded(other, [row], place, share=False)[1] for row in rows]).sum(dim=0)
    typical = float((packed_N - alone_N).double().square().mean().sqrt())
    gradient = float((packed_grad - alone_grad).norm() / alone_grad.norm())
    report.row("packed against alone", case=name, by=calls(), nats_a_token=typical, gradient=gradient)
    allowed = ALLOWED[dtype].packed
    report.demand(typical <= allowed, f"{name}: {typical:.2g} nats a token from each sequence alone, {allowed} allowed")
    most = ALLOWED_GRADIENT[dtype]
    report.demand(gradient <= most, f"{name}: the gradient is {gradient:.2g} of its norm off, {most} allowed")


def own_logps(model: UFTModel, row: Sequence, place: Place) -> Tensor:
    """Log-probs by the model's own forward and transformers' own attention. It has no backward on a GPU."""
    batch = micro_batch([row]).to(place.device)
    with torch.no_grad():
        logps_N = model(batch, [model.streams["policy"]], through_logits=True)["policy"].token_logps_N
    assert logps_N is not None
    return logps_N


def forwarded(model: UFTModel, rows: list[Sequence], place: Place, *, share: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of the policy's supervised tokens, and the gradient of their sum in all adapters, flat."""
    batch = micro_batch(rows, share_prompts=share).to(place.device)
    output = model(batch, [model.streams["policy"]])["policy"]
    assert output.token_logps_N is not None
    output.token_logps_N.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([p.grad.flatten().float() for p in trained if p.grad is not None])
    model.zero_grad()
    return output.token_logps_N.detach(), gradient


@contextmanager
def counted() -> Iterator[Any]:
    """Within the block; gives a function that says which way the packed attention took."""
    before: Any = packed_attention._varlen
    taken: list[str] = []

    def seen(*args: Any) -> Tensor:
        taken.append("varlen")
        return before(*args)

    packed_attention._varlen = seen  # type: ignore[assignment]
    try:
        yield lambda: "varlen" if taken else "one segment after the other, or the library's"
    finally:
        packed_attention._varlen = before
