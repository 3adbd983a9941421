"""How often a micro-step and a step let the host wait for the GPU, and whether an upload of a few numbers does.

A GPU counts them itself (`torch.cuda.set_sync_debug_mode`); on a CPU reads of a value are counted instead.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_check.engines import engine_of, join_group_of_one, objective
from gpu_check.models import families, random_policy, sequences
from gpu_check.report import Place, Report, wait
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.known.cache import Known
from uft_ds.objectives.objective import count_terms
from uft_ds.objectives.reference import HowReference
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import Output, Stream
from uft_ds.training.determinism import make_deterministic
from uft_ds.training.forwarding import Method
from uft_ds.training.step import micro_step, run_step

MICRO_STEPS = 2


class PlainEngine:
    """What a micro-step uses of the engine, without DeepSpeed: forward the module, start the backward."""

    def __init__(self, model: UFTModel, device: torch.device) -> None:
        self.module, self.streams, self.device = model, model.streams, device

    def __call__(self, batch: MicroBatch, streams: Seq[Stream], *, with_statistics: bool = False) -> dict[str, Output]:
        outputs: dict[str, Output] = self.module(batch, streams, with_statistics=with_statistics)
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()


def run(report: Report, place: Place) -> None:
    make_deterministic()  # as runs do by default; some deterministic kernels wait
    without_deepspeed(report, place)
    under_zero(report, place)
    if place.device.type == "cuda":
        _uploads(report)


def _step(place: Place) -> Step:
    return Step(0, tuple(sequences(9, 30, 14) if place.toy else sequences(300, 900, 511)))


def without_deepspeed(report: Report, place: Place) -> None:
    """What our own code and transformers do: nothing may wait."""
    config, step = families(toy=place.toy)["llama"], _step(place)
    planted = counted_waits(place, lambda: _read(torch.ones(2, device=place.device)))
    report.fact("a planted wait is counted", sum(planted.values()) == 1)
    report.demand(sum(planted.values()) == 1, f"a planted wait counts {sum(planted.values())}: believe nothing here")
    cases: tuple[tuple[str, HowReference], ...] = (("mse", "lockstep"), ("mse", "cached"), ("nll", "none"))
    for loss, how in cases:
        table = {key: -10.0 for row in step.sequences for key in row.response_keys}
        known = Known.of_reference(how, table if how == "cached" else None)
        policy = random_policy(
            config, place.device, dtype=torch.bfloat16, attention="packed", recompute=True, b_std=1e-3
        )
        plain: Any = PlainEngine(UFTModel(policy), place.device)
        method = Method(plain, objective(loss), known, 1 << 14)
        found = _of_micro_steps(place, method, step, how == "lockstep")
        report.row("waits in a micro-step, without DeepSpeed", reference=how, loss=loss, **found)
        report.demand(found["waits"] == 0, f"{how}: a micro-step waits {found['waits']} times: {found['where']}")


def under_zero(report: Report, place: Place) -> None:
    """What DeepSpeed and the end of a step add to it; counted, not judged."""
    config, step = families(toy=place.toy)["llama"], _step(place)
    join_group_of_one()
    engine = engine_of(config, place)
    method = Method(engine, objective("mse"), Known.of_reference("lockstep"), 1 << 14)
    run_step(method, step, 1e-4)  # compiles, allocates, records ZeRO-3's trace
    report.row("waits under ZeRO-3, one rank", of="a micro-step", **_of_micro_steps(place, method, step, True))
    run_step(method, step, 1e-4)
    whole = counted_waits(place, lambda: run_step(method, step, 1e-4))
    report.row("waits under ZeRO-3, one rank", of="a step of one micro-step", **_said(whole, 1))


def _read(tensor: Tensor) -> float:
    return float(tensor.sum())


def _of_micro_steps(place: Place, method: Method, step: Step, with_reference: bool) -> dict[str, Any]:
    batch = micro_batch(step.sequences).to(place.device)
    terms: Mapping[str, int] = count_terms(method.objective, step.responses)

    def once() -> None:
        for number in range(MICRO_STEPS):
            micro_step(method, batch, with_reference, terms, None, is_last=number == MICRO_STEPS - 1)

    once()  # compiles, allocates
    return _said(counted_waits(place, once), MICRO_STEPS)


def _said(found: Counter[str], times: int) -> dict[str, Any]:
    return {
        "waits": sum(found.values()) / times,
        "where": "; ".join(f"{n} x {what}" for what, n in found.most_common(6)),
    }


def counted_waits(place: Place, action: Any) -> Counter[str]:
    """How often the host waited for the device during an action, by where that was."""
    wait(place)
    if place.device.type != "cuda":
        with _Reads() as reads:
            action()
        return reads.found
    with warnings.catch_warnings(record=True) as said, _sync_debug():
        warnings.simplefilter("always")
        action()
    wait(place)
    # torch says "called a synchronizing CUDA operation", at the line of Python that did; in the backward at its start.
    found = [warning for warning in said if "called a synchronizing" in str(warning.message)]
    return Counter(f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}" for warning in found)


@contextmanager
def _sync_debug() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Reads(TorchDispatchMode):
    """Counts reads of a value: on a GPU each is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _uploads(report: Report) -> None:
    """Milliseconds until the host may go on after sending a few numbers, while the GPU works for long.

    A copy from ordinary memory may wait for the queue, which torch's own count does not see.
    """
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for name, make in (
        ("ordinary memory, non_blocking", lambda: torch.tensor([1.0] * 64).to("cuda", non_blocking=True)),
        ("pinned memory, non_blocking", lambda: torch.tensor([1.0] * 64).pin_memory().to("cuda", non_blocking=True)),
        ("ordinary memory, waiting", lambda: torch.tensor([1.0] * 64, device="cuda")),
    ):
        make()
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(50):
            left @ left
        last.record()
        started = time.perf_counter()
        make()
        seconds = time.perf_counter() - started
        torch.cuda.synchronize()
        report.row("uploads while the GPU is busy", how=name, host_ms=seconds * 1e3, busy_ms=first.elapsed_time(last))
