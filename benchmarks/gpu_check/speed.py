"""Tokens per second, share of the peak FLOP/s and peak memory of a 7B-shaped random model, beside `uft plan`'s memory.

One process measures one way to recompute activations; policy and reference in lockstep, by two forwards, with a stored
reference, and supervised fine-tuning without one.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from typing import Any

import torch

from gpu_check.engines import engine_of, join_group_of_one, objective
from gpu_check.models import sequences, sizes
from gpu_check.report import Place, Report, wait
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known
from uft_ds.record.metrics import model_flops_utilization
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

BASE, LAYERS, BYTES_PER_LAYER = "mistralai/Mistral-7B-v0.3", 32, 440e6
"""The shape; a layer's 218M parameters in bfloat16."""
TOKENS, LENGTH = 8192, 1024
"""Of a micro-batch, and of a sequence in it."""
STEPS = 3
LORA_RANK = 16


@dataclass(frozen=True)
class Way:
    """A way to get the reference. forwarded: by a forward in each step."""

    name: str
    loss: str
    how: Any
    forwarded: bool


LOCKSTEP = Way("lockstep", "mse", "lockstep", True)
SEPARATE = Way("two separate forwards", "mse", "separate", True)
WAYS: dict[str, tuple[Way, ...]] = {
    "lockstep": (LOCKSTEP, Way("cached", "mse", "cached", False), Way("SFT", "nll", "none", False))
}
WAYS["separate"] = (SEPARATE,)


def run(report: Report, place: Place, recompute: str) -> None:
    """recompute: `true` or `selective`, as `model.gradient_checkpointing`."""
    join_group_of_one()
    config = model_config(place)
    report.fact("model", f"{BASE}'s shape, {config.num_hidden_layers} layers, random weights")
    if config.num_hidden_layers < LAYERS:
        report.fact("not measured", f"all {LAYERS} layers: memory is short, or the sizes are toys")
    report.fact("tokens of a micro-batch", place.size(TOKENS, 128))
    for mode, ways in WAYS.items():
        if place.seconds_left < 20 and not place.toy:
            report.demand(False, f"no time left for {', '.join(way.name for way in ways)}")
            continue
        before = torch.cuda.memory_allocated() if place.device.type == "cuda" else 0  # what the last engine has left
        started = time.perf_counter()
        engine = engine_of(config, place, recompute=recompute == "true" or "selective", mode=mode)
        report.fact(f"seconds to build the engine, {mode}", time.perf_counter() - started)
        for way in ways:
            _measure(report, place, engine, config, way, recompute, before)
        engine.deepspeed.destroy()
        del engine
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


def model_config(place: Place) -> Any:
    """Mistral 7B's, with as many layers as memory has room for: twice, while ZeRO-3 takes the weights over."""
    import transformers as hf

    from uft_ds.planning.shapes import shipped_config

    if place.toy:
        return hf.MistralConfig(**sizes(toy=True), sliding_window=None)
    config = shipped_config("Mistral-7B-v0.3")
    if place.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        config.num_hidden_layers = max(1, min(LAYERS, int(0.4 * free / BYTES_PER_LAYER)))
    return config


def _measure(report: Report, place: Place, engine: Engine, config: Any, way: Way, recompute: str, before: int) -> None:
    """Three steps after two that compile, allocate and record.

    Args:
        before: bytes of the GPU in use before the engine was built.
    """
    length = place.size(LENGTH, 32)
    count = place.size(TOKENS, 128) // length
    rows = tuple(sequences(*[length] * count, vocabulary=config.vocab_size))
    step = Step(0, rows)
    table = {key: -2.0 * length for row in rows for key in row.response_keys}
    known = Known.of_reference(way.how, table if way.how == "cached" else None)
    method = Method(engine, objective(way.loss), known, TOKENS)
    name = f"{way.name}, checkpointing {recompute}"
    try:
        run_step(method, step, 1e-5)
        run_step(method, step, 1e-5)
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(place)
        started = time.perf_counter()
        losses = [run_step(method, step, 1e-5).metrics["loss"] for _ in range(place.size(STEPS, 1))]
        wait(place)
        seconds = (time.perf_counter() - started) / len(losses)
    except torch.OutOfMemoryError as error:
        report.demand(False, f"{name}: out of memory ({str(error).splitlines()[0][:200]})")
        return
    tokens_per_second = count * length / seconds
    policy: Any = engine.module.policy
    mfu = model_flops_utilization(policy, tokens_per_second, reference_share=float(way.forwarded))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if place.device.type == "cuda" else None
    planned, with_reserve = planned_gb(place, config, way, recompute)
    report.row(
        "a 7B-shaped model", way=name, tokens_per_second=tokens_per_second, seconds_a_step=seconds, mfu=mfu,
        peak_gb=peak, planned_gb=planned, planned_with_reserve_gb=with_reserve, loss=losses[-1],
    )  # fmt: skip
    judge(report, name, losses, peak, with_reserve)


def judge(report: Report, name: str, losses: list[float], peak_gb: float | None, planned_gb: float) -> None:
    """A loss must be finite, and the peak of memory no higher than the plan that is to hold."""
    report.demand(all(abs(loss) < float("inf") for loss in losses), f"{name}: a loss is not finite")
    if peak_gb is not None:
        report.demand(peak_gb <= planned_gb, f"{name}: peak memory {peak_gb:.1f} GB, uft plan says {planned_gb:.1f} GB")


def planned_gb(place: Place, config: Any, way: Way, recompute: str) -> tuple[float, float]:
    """A GPU's memory by `uft plan`, without and with its reserve for libraries and fragments, GB."""
    from uft_ds.planning.hardware import Figures, cluster_of
    from uft_ds.planning.plan import make_plan
    from uft_ds.recipe.to_settings import load_settings

    folder = place.work / "planned"
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    data = place.work / "planned.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "score": 0.5}\n', encoding="utf-8")
    recipe = place.work / "planned.yaml"
    tokens = place.size(TOKENS, 128)
    recipe.write_text(
        json.dumps(
            {
                "name": "planned",
                "model": {"base": str(folder), "gradient_checkpointing": _as_in_a_recipe(recompute)},
                "lora": {"rank": LORA_RANK, "alpha": 2.0 * LORA_RANK},
                "data": {
                    "max_length": place.size(LENGTH, 32),
                    "sources": [{"format": "jsonl", "path": str(data)}],
                },
                "objective": {"loss": way.loss},
                "reference": {
                    "cache": way.how == "cached",
                    "mode": "separate" if way.how == "separate" else "lockstep",
                },
                "train": {
                    "examples_per_step": tokens // place.size(LENGTH, 32), "tokens_per_micro_batch": tokens,
                    "steps": 10,
                },
                "deepspeed": "zero3",
                "output": str(place.work / "planned_run"),
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    settings = load_settings(str(recipe))
    cluster = cluster_of(nodes=1, gpus=1, gpu="h200", figures=Figures(network_gbits=400))
    gpu = make_plan(settings, cluster).outcome.gpu
    return (gpu.total_bytes - gpu.reserve_bytes) / 1e9, gpu.total_bytes / 1e9


def _as_in_a_recipe(recompute: str) -> bool | str:
    return True if recompute == "true" else recompute
