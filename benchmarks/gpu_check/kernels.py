"""The log-prob kernels against float64, and their time beside the matrix products that they cannot do without."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from token_logps import Shape, measure
from torch import Tensor

from gpu_check.report import Place, Report
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.kernels.naive import naive_token_logps
from uft_ds.kernels.sweeps import sweeps_for
from uft_ds.kernels.token_logps import token_logps

CAPPED = LogitTransform(scale=0.5, softcap=5.0, temperature=1.3)
SHAPES = [(7, 96, 97), (127, 64, 1009), (300, 256, 32_003), (513, 1024, 50_257)]
TOY_SHAPES = [(7, 96, 97), (33, 64, 1009)]
"""(tokens, hidden, vocabulary): primes, more than one tile, rows that a chunk does not divide."""

ALLOWED_NATS, ALLOWED_RELATIVE = 1e-5, 1e-6
"""Of log-probs, invariant 6."""
ALLOWED_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 3 * 2.0**-8}
"""Of the largest gradient: three roundings in bfloat16; the sum of a vocabulary in float32."""

SPEED_SHAPES = [Shape("Qwen 32B", 8192, 5120, 152_064), Shape("Mistral 7B", 8192, 4096, 32_768)]
TOY_SPEED_SHAPES = [Shape("toy", 32, 64, 2048)]


def run(report: Report, place: Place) -> None:
    report.fact("sweeps", sweeps_for(place.device, torch.float32).__name__)
    for sizes, dtype, (name, transform), is_trained in product(
        TOY_SHAPES if place.toy else SHAPES,
        (torch.bfloat16, torch.float32),
        (("plain", UNCHANGED), ("capped", CAPPED)),
        (False, True),
    ):
        _against_float64(report, place, sizes, dtype, transform, f"{name}{', trained head' if is_trained else ''}")
    for shape, pair in product(TOY_SPEED_SHAPES if place.toy else SPEED_SHAPES, (False, True)):
        _speed(report, place, shape, pair)


def _against_float64(
    report: Report, place: Place, shape: tuple[int, int, int], dtype: torch.dtype, transform: LogitTransform, name: str
) -> None:
    num_tokens, dim, vocabulary = shape
    generator = torch.Generator(place.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": place.device}
    hidden_ND = torch.randn(num_tokens, dim, **options).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, dim, **options) * 3 / dim**0.5).to(dtype)
    weight_VD.requires_grad_("trained" in name)
    bias_V = torch.randn(vocabulary, **options).to(dtype)
    targets_N = torch.randint(vocabulary, (num_tokens,), **options)
    upstream_N = torch.randn(num_tokens, **options)
    inputs = [hidden_ND, weight_VD] if weight_VD.requires_grad else [hidden_ND]
    logps_N, reference_N = token_logps(
        hidden_ND, weight_VD, targets_N, others_ND=[hidden_ND.detach()], bias=bias_V, transform=transform
    )
    found = torch.autograd.grad(logps_N, inputs, upstream_N)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weight = exact[1] if len(exact) > 1 else weight_VD.detach().double()
    of_transform: dict[str, Any] = {
        "scale": transform.scale,
        "softcap": transform.softcap,
        "temperature": transform.temperature,
    }
    true_N = naive_token_logps(exact[0], weight, targets_N, bias_V.double(), **of_transform)
    true = torch.autograd.grad(true_N, exact, upstream_N.double())
    difference_N = (logps_N.detach().double() - true_N.detach()).abs()
    excess = float((difference_N - ALLOWED_RELATIVE * true_N.detach().abs()).max())
    gradient = max(relative(of, to) for of, to in zip(found, true, strict=True))
    where = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {name}"
    report.row(
        "against float64", case=where, nats=float(difference_N.max()), gradient=gradient,
        equal_bits=bool(torch.equal(logps_N, reference_N)),
    )  # fmt: skip
    report.demand(excess <= ALLOWED_NATS, f"{where}: log-probs are {float(difference_N.max()):.2g} nats off")
    allowed = ALLOWED_GRADIENT[dtype]
    report.demand(gradient <= allowed, f"{where}: the gradient is {gradient:.2g} of its largest off, {allowed:.2g} is")
    report.demand(torch.equal(logps_N, reference_N), f"{where}: equal rows of two streams give unequal bits")


def relative(found: Tensor, true: Tensor) -> float:
    """The largest difference, as a share of the largest true value."""
    return float((found.double() - true).abs().max() / true.abs().max())


def _speed(report: Report, place: Place, shape: Shape, pair: bool) -> None:
    found = measure(shape, "uft_ds", pair, place.size(5, 1), place.device.type)
    bound = 3 if pair else 2
    report.row(
        "time and memory", shape=shape.name, streams=2 if pair else 1, ms=found.seconds * 1e3,
        matmul_tflops=shape.flops / found.matmul_seconds / 1e12,
        share_of_matmul_bound=bound / found.units, peak_mb=found.peak_bytes / 1e6, nats=found.error,
    )  # fmt: skip
    # Logits of a large vocabulary are larger, and so is a float32's rounding of them.
    report.demand(found.error <= 1e-4, f"{shape.name}: log-probs are {found.error:.2g} nats off")
