"""What a reference costs: lockstep against two forwards, a cached reference, plain SFT, and TRL.

    python benchmarks/reference_traffic.py [--ranks 2 4] [--no-trl] [--model FOLDER]

Ways to get a LoRA reference under ZeRO-3, on the same random Qwen2-shaped model and the same packed rows:

    lockstep           uft_ds: one visit of each layer for both streams, layers are ZeRO-3 leaf modules
    two, one root      both forwards inside one call of the root module, leaf modules
    two calls          the policy's forward, then the reference's under PEFT's disable_adapter, as TRL does it
    two calls, leaf    the same with leaf modules
    cached             uft_ds from the second epoch on: every reference is read from the run's cache
    SFT                the policy alone, no reference at all
    three streams      lockstep, and a frozen adapter beside the bare base and the policy
    policy and value   two trained adapters in one visit, the second under a scalar head
    SFT, same adapters the policy alone, in a model that holds the third adapter too

Counted on rank 0 over four steps after two that warm up: all-gathers and the bytes they return, a micro-step;
invalidations of ZeRO's prefetch trace, in all; bytes of activations saved for the backward of one micro-step; seconds
of the fastest step; and the growth of resident memory over that before the first step. Evaluation and saving are not
in it. ZeRO-3's defaults would keep a tiny model whole on each rank; SETTINGS below make it gather, as a large one has
to. Then TRL's trainers end to end (`against_trl.py`). Absolute times on a shared CPU mean nothing.

Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import Bar, at_most, report, table_of
from process_costs import peak_rss, reset_peak
from ranks import run_on_ranks
from rich.console import Console
from rich.table import Table
from tiny import VOCAB_SIZE, build_tiny_tokenizer
from toy import UFT, forwarded, toy_model, toy_sequences

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known, fill
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.stream import Stream, logps_of
from uft_ds.training.forwarding import streams_of

HIDDEN, LAYERS, VOCABULARY = 256, 4, 4096
WARM_UP_STEPS, STEPS = 2, 4
SEQUENCES_PER_RANK, TOKENS_PER_MICRO_BATCH = 40, 560

SETTINGS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 1_000_000,  # elements: a little more than one layer
    "stage3_max_live_parameters": 2_500_000,
    "stage3_max_reuse_distance": 100,
}

THIRD = Stream("third", "third")
VALUE = Stream("value", "value", trained=True, head="scalar")

CASES: dict[str, dict[str, Any]] = {
    "lockstep": {"mode": "lockstep", "leaf": True, "calls": 1, "cache": "lockstep"},
    "two, one root": {"mode": "separate", "leaf": True, "calls": 1, "cache": "lockstep"},
    "two calls": {"mode": "separate", "leaf": False, "calls": 2, "cache": "lockstep"},
    "two calls, leaf": {"mode": "separate", "leaf": True, "calls": 2, "cache": "lockstep"},
    "cached": {"mode": "lockstep", "leaf": True, "calls": 1, "cache": "cached"},
    "SFT": {"mode": "separate", "leaf": True, "calls": 1, "cache": "none"},
    "three streams": {"mode": "lockstep", "leaf": True, "calls": 1, "cache": "lockstep", "beside": THIRD},
    "policy and value": {"mode": "lockstep", "leaf": True, "calls": 1, "cache": "none", "beside": VALUE},
    "SFT, same adapters": {"mode": "lockstep", "leaf": True, "calls": 1, "cache": "none", "idle": THIRD},
}
"""beside: a stream more, in the same visit. idle: one whose adapter is there, and is gathered with its layer."""


@dataclass(frozen=True)
class Measurement:
    """Of one rank."""

    gathers: float
    """A micro-step, as are the bytes."""
    gathered_bytes: float
    invalidations: int
    """Over all steps counted."""
    saved_bytes: int
    """Of the first micro-batch."""
    seconds: float
    """Of the fastest step."""
    peak_growth_bytes: int
    largest_initial_ratio: float | None
    """|log-ratio| before the first step, nats; None without a reference that is computed."""
    logps_R: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Counters:
    gathers: int = 0
    gathered_bytes: int = 0
    invalidations: int = 0


@contextmanager
def counting() -> Iterator[Counters]:
    """Count DeepSpeed's all-gathers at its communication backend, and lost prefetch traces."""
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    counters = Counters()
    backend: Any = comm.cdb
    gather, invalidate = backend.all_gather_into_tensor, Coordinator._invalidate_trace

    def counted(output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counters.gathers += 1
        counters.gathered_bytes += output_tensor.numel() * output_tensor.element_size()
        return gather(output_tensor, *args, **kwargs)

    def invalidated(self: Any) -> None:
        counters.invalidations += 1
        invalidate(self)

    backend.all_gather_into_tensor, Coordinator._invalidate_trace = counted, invalidated
    try:
        yield counters
    finally:
        backend.all_gather_into_tensor, Coordinator._invalidate_trace = gather, invalidate


@contextmanager
def measuring_saved(sizes: dict[int, int]) -> Iterator[None]:
    """Collect the storages that autograd keeps; ZeRO's gathered weights are not activations."""

    def pack(tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


class Case:
    """One way to get the reference: an engine, and how a step's micro-batches are forwarded."""

    def __init__(
        self,
        folder: Path,
        name: str,
        gradient_checkpointing: bool,
        file: str = "zero3_cpu",
        sequences_per_rank: int = SEQUENCES_PER_RANK,
    ) -> None:
        self._how = CASES[name]
        self._sequences_per_rank = sequences_per_rank
        config = read_deepspeed_file(file)
        config["zero_optimization"] |= SETTINGS
        model = toy_model(
            folder,
            b_std=0.0,
            gradient_checkpointing=gradient_checkpointing,
            reference_mode=self._how["mode"],
            further=[self._how[key] for key in ("beside", "idle") if key in self._how],
        )
        self.policy = model.policy
        leaf = decoder_layer_class(model.policy.get_base_model()) if self._how["leaf"] else None
        self.engine = Engine(
            model,
            deepspeed_config(config, dtype=torch.float32, max_grad_norm=1e6),
            layer_class=leaf,
            weight_decay=0.0,
        )
        self.cache = Known.of_reference(self._how["cache"])
        if self._how["cache"] == "cached":
            fill(self.engine, self.cache, [whole_step(sequences_per_rank)], TOKENS_PER_MICRO_BATCH, flush_every=1)

    def forward(self, batch: MicroBatch, forward_reference: bool) -> tuple[Tensor, Tensor | None]:
        if self._how["cache"] == "lockstep" and self._how["calls"] == 2:
            logps_R = forwarded(self.engine, batch, with_reference=False)["policy"]
            with torch.no_grad(), self.policy.disable_adapter():
                outputs = self.engine(batch, [self.engine.streams["reference"]])
            return logps_R, logps_of(outputs, batch)["reference"]
        streams = streams_of(self.engine, with_reference=forward_reference)
        outputs = self.engine(batch, [*streams, *([self._how["beside"]] if "beside" in self._how else [])])
        logps = logps_of(outputs, batch)
        if "value" in outputs:  # no term of the loss depends on it, but its gradient is computed as one that is 0
            values_R = outputs["value"].values_R
            assert values_R is not None
            logps["policy"] = logps["policy"] + 0.0 * values_R
        return logps["policy"], self.cache.resolve(batch, logps.get("reference"))

    def step(self) -> int:
        """All micro-batches and an update that changes nothing, so that every step computes the same; their number."""
        step = whole_step(self._sequences_per_rank)
        terms = count_terms(UFT, step.responses)
        batches = self.cache.micro_batches(self.engine, step, TOKENS_PER_MICRO_BATCH)
        for number, (batch, forward_reference) in enumerate(batches, start=1):
            logps_R, reference_R = self.forward(batch, forward_reference)
            if reference_R is None:
                loss = -logps_R.sum() / 1000
            else:
                loss, _ = micro_batch_loss(UFT, batch, terms, {"policy": logps_R, "reference": reference_R})
            self.engine.backward(loss, is_last=number == len(batches))
        self.cache.learn(self.engine, step)
        self.engine.step(0.0)
        return len(batches)

    def first_micro_batch(self) -> tuple[MicroBatch, bool]:
        step = whole_step(self._sequences_per_rank)
        return self.cache.micro_batches(self.engine, step, TOKENS_PER_MICRO_BATCH)[0]

    def largest_initial_ratio(self) -> float | None:
        """|log-ratio| of the first micro-batch on the path that trains, before anything has."""
        batch, forward_reference = self.first_micro_batch()
        logps_R, reference_R = self.forward(batch, forward_reference)
        self.engine.backward(logps_R.sum() * 0.0, is_last=True)
        self.engine.step(0.0)
        return None if reference_R is None else float((logps_R.detach() - reference_R).abs().max())

    def set_adapters(self) -> None:
        """Adapters that change something, the same in every case."""
        from deepspeed.utils import safe_set_full_fp32_param

        generator = torch.Generator().manual_seed(3)
        parameters: Any = self.engine.module.named_parameters()  # with what DeepSpeed adds to them
        for name, parameter in parameters:
            if "lora_B" in name and ".default." in name:
                value = torch.randn(parameter.ds_shape, generator=generator) * 0.05
                safe_set_full_fp32_param(parameter, value)


def whole_step(sequences_per_rank: int = SEQUENCES_PER_RANK) -> Step:
    """Uneven sequences with one to three responses each, for all ranks together."""
    count = sequences_per_rank * torch.distributed.get_world_size()
    return Step(0, toy_sequences(count, seed=100, longest=120))


def measure(
    folder: Path,
    name: str,
    gradient_checkpointing: bool,
    steps: int = STEPS,
    sequences_per_rank: int = SEQUENCES_PER_RANK,
) -> Measurement:
    """On one of the ranks: a few steps, counted; then log-probs and gradients at fixed weights."""
    from deepspeed.utils import safe_get_full_grad

    case = Case(folder, name, gradient_checkpointing, sequences_per_rank=sequences_per_rank)
    # As every run starts, with a forward in evaluation mode: DeepSpeed's later gathers depend on it, by one layer.
    with case.engine.evaluating():
        batch = case.engine.micro_batches(whole_step(sequences_per_rank), TOKENS_PER_MICRO_BATCH)[0]
        forwarded(case.engine, batch, with_reference=False)
    base = reset_peak()
    ratio = case.largest_initial_ratio()
    case.set_adapters()
    for _ in range(WARM_UP_STEPS):  # the first writes the adapters into the weights, the second records ZeRO's trace
        case.step()
    seconds, micro_steps = [], 0
    with counting() as counters:
        for _ in range(steps):
            started = time.perf_counter()
            micro_steps += case.step()
            seconds.append(time.perf_counter() - started)
    peak = peak_rss() - base
    batch, forward_reference = case.first_micro_batch()
    saved: dict[int, int] = {}
    with measuring_saved(saved):
        logps_R, _ = case.forward(batch, forward_reference)
    weights_R = torch.linspace(-1, 1, len(logps_R), dtype=logps_R.dtype)
    case.engine.backward((logps_R * weights_R).sum(), is_last=True)
    gradients = {
        name: safe_get_full_grad(p).clone() for name, p in case.engine.module.named_parameters() if p.requires_grad
    }
    return Measurement(
        counters.gathers / micro_steps,
        counters.gathered_bytes / micro_steps,
        counters.invalidations,
        sum(saved.values()),
        min(seconds),
        peak,
        ratio,
        logps_R.detach(),
        gradients,
    )


def write_model(folder: Path, *, hidden: int = HIDDEN, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Path:
    """A random Qwen2-shaped float32 model with the tests' tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    assert vocabulary >= VOCAB_SIZE
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.05,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.float32).save_pretrained(folder)
    return build_tiny_tokenizer(folder)


# ---- the table and the bars


def measure_all(
    folder: Path, ranks: int, gradient_checkpointing: bool, *, sequences_per_rank: int = SEQUENCES_PER_RANK
) -> dict[str, list[Measurement]]:
    """Every case, of every rank."""
    given = (gradient_checkpointing, STEPS, sequences_per_rank)
    return {name: run_on_ranks(measure, ranks, folder, name, *given) for name in CASES}


def bars(results: dict[str, list[Measurement]]) -> list[Bar]:
    """What lockstep has to show; every case must compute the same policy."""
    first = {name: measured[0] for name, measured in results.items()}
    ours, sft, cached = first["lockstep"], first["SFT"], first["cached"]
    usual, usual_leaf = first["two calls"], first["two calls, leaf"]
    initial_ratios: list[Any] = [first[name].largest_initial_ratio for name in ("lockstep", "two, one root")]

    return [
        at_most("lockstep: bytes / SFT", ours.gathered_bytes / sft.gathered_bytes, 1.02),
        at_most("lockstep: bytes / two calls, leaf", ours.gathered_bytes / usual_leaf.gathered_bytes, 0.70),
        at_most("lockstep: collectives / two calls", ours.gathers / usual.gathers, 1 / 20),
        at_most("lockstep: invalidations", ours.invalidations, 0),
        at_most("lockstep: saved activations / SFT", ours.saved_bytes / sft.saved_bytes, 1.05),
        at_most("three streams: bytes / SFT with the same adapters",
                first["three streams"].gathered_bytes / first["SFT, same adapters"].gathered_bytes, 1.0),
        at_most("three streams: collectives / SFT", first["three streams"].gathers / sft.gathers, 1.0),
        at_most("three streams: saved activations / SFT", first["three streams"].saved_bytes / sft.saved_bytes, 1.05),
        at_most("policy and value: bytes / SFT with the same adapters",
                first["policy and value"].gathered_bytes / first["SFT, same adapters"].gathered_bytes, 1.01),
        at_most("streams: invalidations",
                sum(first[name].invalidations for name in ("three streams", "policy and value")), 0),
        at_most("cached: |bytes / SFT - 1|", abs(cached.gathered_bytes / sft.gathered_bytes - 1), 0.0),
        at_most("cached: |collectives / SFT - 1|", abs(cached.gathers / sft.gathers - 1), 0.0),
        at_most("cached: saved activations / SFT", cached.saved_bytes / sft.saved_bytes, 1.0),
        at_most("log-ratio before the first step, lockstep and one root",
                max(initial_ratios), 0.0),
        at_most("policy log-probs, largest difference between cases", logp_spread(results), 1e-4),
        at_most("gradients, largest relative difference between cases", gradient_spread(results), 1e-5),
    ]  # fmt: skip


def largest(values: Iterable[float]) -> float:
    """The largest, or infinity where one is not a number: `max` may pass over it."""
    return max(float("inf") if math.isnan(value) else value for value in values)


def logp_spread(results: dict[str, list[Measurement]]) -> float:
    """Nats a response, over all ranks, against the first case."""
    first, *others = results.values()
    return largest(
        float((a.logps_R - b.logps_R).abs().max()) for other in others for a, b in zip(first, other, strict=True)
    )


def gradient_spread(results: dict[str, list[Measurement]]) -> float:
    """Relative to each tensor's largest entry, against the first case."""
    first = next(iter(results.values()))[0].gradients
    return largest(
        float((measured[0].gradients[name] - grad).abs().max() / grad.abs().max())
        for measured in results.values()
        for name, grad in first.items()
    )


def table(results: dict[str, list[Measurement]], ranks: int, gradient_checkpointing: bool) -> Table:
    checkpointing = "with" if gradient_checkpointing else "without"
    shown = table_of(
        f"{ranks} ranks, {checkpointing} gradient checkpointing; all-gathers and MB a micro-step",
        "", "all-gathers", "MB", "/ SFT", "invalidations", "saved MB", "time / SFT", "peak +MB",
    )  # fmt: skip
    sft = results["SFT"][0]
    for name, (row, *_) in results.items():
        shown.add_row(
            name, f"{row.gathers:.1f}", f"{row.gathered_bytes / 1e6:.2f}",
            f"{row.gathered_bytes / sft.gathered_bytes:.3f}", str(row.invalidations), f"{row.saved_bytes / 1e6:.3f}",
            f"{row.seconds / sft.seconds:.2f}", f"{row.peak_growth_bytes / 1e6:.0f}",
        )  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--no-trl", action="store_true", help="leave out the comparison with TRL")
    parser.add_argument("--model", type=Path, help="a small real model for the comparison with TRL")
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    versions()
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        for ranks in options.ranks:
            for gradient_checkpointing in (True, False):
                results = measure_all(folder, ranks, gradient_checkpointing)
                console.print(table(results, ranks, gradient_checkpointing))
                missed += report(console, bars(results))
    if not options.no_trl:
        from against_trl import compare

        missed += report(console, compare(console, options.model))
    return 1 if missed else 0


def versions() -> None:
    from importlib.metadata import version

    names = ("torch", "deepspeed", "transformers", "peft")
    print(", ".join(f"{name} {version(name)}" for name in names), "; ZeRO-3:", SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
