"""The optimiser step: AdamW against float64, and how often it exchanges values and waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engines import accumulate, engine_of, weights
from ranks import run_on_ranks
from suites import long_but
from tiny import build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from toy import UFT, toy_step

FILES = ("zero3_cpu", "zero3_offload", "zero2")
STEPS, RATE, BETAS, DECAY, MAX_NORM = 3, 1e-2, (0.9, 0.95), 0.1, 0.01


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads from tensors: on a GPU each would wait for all kernels before it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counted_step(base: Path, file: str) -> tuple[Counter[str], int, int]:
    """Collectives and reads of one optimiser step, and how many parameters it updates."""
    engine = engine_of(base, file=file, max_grad_norm=MAX_NORM)
    for _ in range(2):  # the second is counted: AdamW's state exists
        _, loss = accumulate(engine, engine.micro_batches(toy_step(), 64), UFT)
        calls: Counter[str] = Counter()

        def counting(name: str, function: Any, calls: Counter[str] = calls) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                return function(*args, **kwargs)

            return call

        names = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_object", "barrier")
        patches = {name: counting(name, getattr(torch.distributed, name)) for name in names}
        with mock.patch.multiple(torch.distributed, **patches), Reads() as reads:
            assert not engine.step(RATE, torch.tensor(loss)).skipped
    return calls, reads.count, sum(parameter.requires_grad for parameter in engine.module.parameters())


@pytest.mark.parametrize("file", long_but(["zero3_cpu"], FILES))
def test_a_step_exchanges_its_norm_once(tmp_path: Path, file: str) -> None:
    """One all-reduce for loss and norm, and a number of reads that does not grow with the number of adapters."""
    counts = {}
    for layers in (1, 3):
        base = build_tiny_model(tmp_path / str(layers), "qwen2", num_hidden_layers=layers)
        (calls, reads, parameters), other = run_on_ranks(counted_step, 2, base, file)
        assert other == (calls, reads, parameters)
        assert calls["all_reduce"] == 1
        assert not {name for name in calls if name != "all_reduce"} or file == "zero2", calls
        counts[parameters] = reads
    assert len(counts) == 2, "more layers, more adapters"
    assert len(set(counts.values())) == 1, counts
    assert max(counts.values()) <= 2


def updated(base: Path, file: str) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]]:
    """Before each step and after the last one: weights, and the gradient and the norm that the step clips."""
    engine = engine_of(base, file=file, max_grad_norm=MAX_NORM, weight_decay=DECAY)
    history: list[Any] = []
    for _ in range(STEPS):
        before = weights(engine)
        grads, loss = accumulate(engine, engine.micro_batches(toy_step(), 64), UFT)
        history.append((before, grads, engine.step(RATE, torch.tensor(loss)).grad_norm))
    return [*history, (weights(engine), {}, 0.0)]


@pytest.mark.parametrize("file", long_but(["zero3_cpu"], FILES))
def test_updates_are_those_of_adamw_in_float64(tiny_qwen2: Path, file: str) -> None:
    """torch's plain AdamW on one float64 tensor for each adapter, from the same gradients, clipped by their norm."""
    *steps, (after, _, _) = run_on_ranks(updated, 2, tiny_qwen2, file)[0]
    masters = {name: tensor.double().requires_grad_() for name, tensor in steps[0][0].items()}
    plain = torch.optim.AdamW(masters.values(), lr=RATE, betas=BETAS, weight_decay=DECAY, foreach=False)
    for _, grads, norm in steps:
        expected_norm = float(torch.stack([grad.double().norm() for grad in grads.values()]).norm())
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert norm > MAX_NORM, "the case should clip"
        for name, master in masters.items():
            master.grad = grads[name].double() * (MAX_NORM / (expected_norm + 1e-6))
        plain.step()
    moved = max(float((after[name] - steps[0][0][name]).abs().max()) for name in masters)
    assert moved > RATE
    for name, master in masters.items():
        assert (after[name] - master).abs().max() <= 1e-4 * moved, name
