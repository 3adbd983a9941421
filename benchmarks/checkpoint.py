"""Saving and converting: bytes, stall, memory and time, beside DeepSpeed's, transformers' and PEFT's own ways.

    python benchmarks/checkpoint.py [--gigabytes 2] [--folder runs/checkpoint]

A random Qwen2 of so many GB in bfloat16, in several files, with a LoRA of rank 16 that has made one step on two ZeRO-3
ranks over gloo.

save      ours; DeepSpeed's `save_checkpoint` with and without frozen parameters; and what transformers' Trainer does
          for a PEFT model: `_zero3_consolidated_16bit_state_dict` and PEFT's `save_pretrained`, then DeepSpeed's
          without frozen parameters. Time that training waits, time until all is written, what rank 0 gets from the
          collectives (at their lowest level in torch), what is written, and by how much the peak of resident memory
          grows over that before.
convert   ours (without the comparison); PEFT's `merge_and_unload` and `save_pretrained`; DeepSpeed's `zero_to_fp32` of
          its own checkpoint, whole: that is base and adapter apart, in float32, without a merge; and copying the base's
          files. Each in a fresh process: time and the peak of resident memory, and that of the imports alone.
check     our comparison of the merged model with its adapter.

Exits with 1 where convert's peak is above 1.5 times the largest file + 600 MB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_on_ranks
from tiny import build_tiny_tokenizer

SHARD_BYTES = 500_000_000
ALLOWED_FILES, ALLOWED_BYTES = 1.5, 600e6
HIDDEN, MLP, HEADS, KEY_VALUE_HEADS, VOCABULARY, RANK = 2048, 8192, 16, 4, 32768, 16


def build_base(folder: Path, gigabytes: float) -> Path:
    """A model written shard by shard."""
    from transformers import Qwen2Config

    from uft_ds.export.streamed_logps import empty_model
    from uft_ds.streams.weight_files import TensorInfo, write_model

    shares = 2 + 2 * KEY_VALUE_HEADS / HEADS
    layer_bytes = 2 * (shares * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
    config = Qwen2Config(
        hidden_size=HIDDEN, intermediate_size=MLP, vocab_size=VOCABULARY, num_attention_heads=HEADS,
        num_hidden_layers=max(2, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes)),
        num_key_value_heads=KEY_VALUE_HEADS, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    build_tiny_tokenizer(folder)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    infos = [TensorInfo(n, tuple(p.shape), torch.bfloat16) for n, p in empty_model(config).named_parameters()]

    def produce(info: TensorInfo) -> torch.Tensor:
        if len(info.shape) == 1:
            return (torch.ones if "norm" in info.name else torch.zeros)(info.shape, dtype=torch.bfloat16)
        return (torch.randn(info.shape, generator=generator) * 0.02).bfloat16()

    write_model(folder, infos, produce, max_shard_bytes=SHARD_BYTES)
    return folder


class CountingCollectives(TorchDispatchMode):
    """The bytes that this process's collectives give it, by whatever library they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":  # the first argument is where the result goes
            results = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in results)
        return func(*args, **(kwargs or {}))


def trained_engine(base: str) -> tuple[Any, Any]:
    """(engine, policy) after a step of our own on two ranks."""
    from toy import UFT, forwarded, toy_step

    from uft_ds.data.packing import rank_micro_batches
    from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
    from uft_ds.engine.engine import Engine, partitioned_loading
    from uft_ds.objectives.objective import count_terms, micro_batch_loss
    from uft_ds.streams.adapters import add_adapters
    from uft_ds.streams.load import decoder_layer_class, load_base
    from uft_ds.streams.model import UFTModel

    file = read_deepspeed_file("zero3_cpu")
    file["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    config = deepspeed_config(file, dtype=torch.bfloat16, max_grad_norm=1.0)
    with partitioned_loading(config):
        model = load_base(base, revision=None, dtype=torch.bfloat16, attention="sdpa", gradient_checkpointing=True)
    policy = add_adapters(model, rank=RANK, alpha=RANK, targets="all-linear", dtype=torch.float32, seed=0)
    engine = Engine(UFTModel(policy), config, layer_class=decoder_layer_class(model), weight_decay=0.0)
    step = toy_step()
    terms = count_terms(UFT, step.responses)
    batches = rank_micro_batches(step, tokens_per_micro_batch=512, rank=engine.rank, world_size=engine.world_size)
    for number, batch in enumerate(batches):
        loss, _ = micro_batch_loss(UFT, batch, terms, forwarded(engine, batch))
        engine.backward(loss, is_last=number == len(batches) - 1)
    engine.step(1e-2)
    return engine, policy


def save_by(way: str, base: str, folder: str) -> dict[str, float]:
    """On each rank: what a save of a freshly trained engine takes."""
    from torch import distributed

    from uft_ds.checkpoint.state import Position, TrainerState
    from uft_ds.checkpoint.writer import CheckpointWriter
    from uft_ds.known.cache import Known
    from uft_ds.record.report import SilentReporter
    from uft_ds.record.run_folder import RunFolder

    engine, policy = trained_engine(base)
    deepspeed = engine.deepspeed
    deepspeed.empty_partition_cache()  # DeepSpeed's own saving needs it after a forward
    out = Path(folder)
    distributed.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with CountingCollectives() as collectives:
        if way == "ours":
            writer = CheckpointWriter(engine, policy, RunFolder(out), SilentReporter(), keep=1, best=None)
            waited = writer.start(Position(TrainerState(1, 0), 0), Known.of_reference("lockstep"))
            writer.finish()
        else:
            if way == "transformers":
                state = deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
                if engine.rank == 0:
                    prefixed = {name.removeprefix("policy."): tensor for name, tensor in state.items()}
                    policy.save_pretrained(str(out / "adapter"), state_dict=prefixed)
            deepspeed.save_checkpoint(str(out), tag="tag", exclude_frozen_parameters=way != "deepspeed, whole")
            waited = time.perf_counter() - started
    return {
        "waited": waited,
        "seconds": time.perf_counter() - started,
        "received": float(collectives.num_bytes),
        "growth": 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def imports_alone(base: Path, adapter: Path, out: Path) -> None:
    """What any of these programs needs before it has done anything."""
    import uft_ds.export.merge  # noqa: F401


def merge_ours(base: Path, adapter: Path, out: Path) -> None:
    from uft_ds.export.low_rank import read_low_rank
    from uft_ds.export.merge import write_merged
    from uft_ds.streams.weight_files import WeightFiles

    out.mkdir()
    shutil.copyfile(base / "config.json", out / "config.json")
    deltas: dict[str, Any] = dict(read_low_rank(adapter))  # of no experts
    write_merged(WeightFiles(base), deltas, out, dtype=None, max_shard_bytes=SHARD_BYTES)


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=SHARD_BYTES)


def zero_to_fp32(base: Path, adapter: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(adapter), str(out), safe_serialization=True)


def copy_files(base: Path, adapter: Path, out: Path) -> None:
    """To the disk, as the others' files need not be."""
    shutil.copytree(base, out)


def check_ours(base: Path, adapter: Path, out: Path) -> None:
    """`out`: the merged model."""
    from uft_ds.data.tokens.tokenize import load_tokenizer
    from uft_ds.export.agreement import compare, sample_sequences

    found = compare(base, adapter, out, sample_sequences(load_tokenizer(str(base))))
    print(f"merged model: {found.summary}, the largest log-ratio is {found.largest_nats:.2g} nats")


def in_a_process(work: Callable[[Path, Path, Path], None], *folders: Path) -> tuple[float, float]:
    """(seconds without the imports, peak resident bytes with them) of a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_measured, work, folders).result()


def _measured(work: Callable[..., None], folders: tuple[Path, ...]) -> tuple[float, float]:
    import peft  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.perf_counter()
    work(*folders)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


SAVES = ("ours", "deepspeed, no base", "deepspeed, whole", "transformers")


def measure_saves(base: Path, folder: Path, console: Console) -> None:
    table = Table("save", "waits s", "written after s", "received MB", "written MB", "peak grows MB")
    for way in SAVES:
        ranks = run_on_ranks(save_by, 2, way, str(base), str(folder / way), timeout_seconds=1800)
        worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        table.add_row(
            way, f"{worst['waited']:.2f}", f"{worst['seconds']:.2f}", f"{ranks[0]['received'] / 1e6:.1f}",
            f"{size_of(folder / way) / 1e6:.1f}", f"{worst['growth'] / 1e6:.0f}",
        )  # fmt: skip
    console.print(table)


def measure_conversions(base: Path, folder: Path, console: Console) -> float:
    """Returns convert's peak, bytes."""
    adapter = folder / "ours" / "latest" / "adapter"
    measured = {
        "imports alone": in_a_process(imports_alone, base, adapter, folder),
        "copy of the base": in_a_process(copy_files, base, adapter, folder / "copied"),
        "ours": in_a_process(merge_ours, base, adapter, folder / "merged"),
        "PEFT": in_a_process(merge_by_peft, base, adapter, folder / "peft"),
        "zero_to_fp32": in_a_process(zero_to_fp32, base, folder / "deepspeed, whole", folder / "fp32"),
        "our check": in_a_process(check_ours, base, adapter, folder / "merged"),
    }
    table = Table("convert", "s", "x copy", "peak MB")
    for name, (seconds, peak) in measured.items():
        ratio = seconds / measured["copy of the base"][0]
        table.add_row(name, f"{seconds:.2f}", f"{ratio:.1f}", f"{peak / 1e6:.0f}")
    console.print(table)
    return measured["ours"][1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoint"))
    options = parser.parse_args()
    folder, console = options.folder.absolute(), Console(width=120)
    shutil.rmtree(folder, ignore_errors=True)
    base = build_base(folder / "base", options.gigabytes)
    files = [path.stat().st_size for path in base.glob("*.safetensors")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("deepspeed", "transformers", "peft"))
    console.print(f"base: {sum(files) / 1e9:.2f} GB in {len(files)} files, the largest {max(files) / 1e6:.0f} MB")
    console.print(f"beside {versions}")
    measure_saves(base, folder, console)
    peak = measure_conversions(base, folder, console)
    bar = ALLOWED_FILES * max(files) + ALLOWED_BYTES
    console.print(
        f"bar: convert's peak at most {ALLOWED_FILES} x the largest file + 600 MB = {bar / 1e6:.0f} MB: "
        f"{'holds' if peak <= bar else 'MISSED'} ({peak / 1e6:.0f} MB)"
    )
    shutil.rmtree(folder)
    return 0 if peak <= bar else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
