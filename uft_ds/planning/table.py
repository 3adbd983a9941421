"""Show a plan as tables in a terminal, or as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uft_ds.planning.alternatives import Alternative, larger_clusters
from uft_ds.planning.hardware import GB
from uft_ds.planning.plan import Plan
from uft_ds.planning.planner import Outcome
from uft_ds.planning.traffic import Traffic

_GPU_ROWS = {
    "weights_shard_bytes": "base weights, this rank's shard",
    "secondary_shard_bytes": "base weights, the node's own copy",
    "gathered_bytes": "gathered layers, prefetch",
    "adapters_bytes": "LoRA",
    "gradients_bytes": "gradients",
    "gradient_bucket_bytes": "gradient buckets",
    "optimizer_bytes": "optimiser, master weights",
    "saved_activations_bytes": "saved activations",
    "layer_bytes": "(a) inside a layer",
    "streams_bytes": "(b) reference stream at the head",
    "head_tile_bytes": "(b) logits, a tile at a time",
    "reserve_bytes": "reserve: CUDA, NCCL, fragmentation",
}
_HOST_ROWS = {
    "processes_bytes": "processes",
    "weights_bytes": "base weights",
    "page_locking_bytes": "page-locked blocks, rounded up",
    "optimizer_bytes": "optimiser, gradients",
    "activations_bytes": "saved activations",
    "checkpoint_bytes": "copy for a checkpoint",
}
_DISK_ROWS = {
    "base_bytes": "the base (read)",
    "checkpoints_bytes": "checkpoints, all that are kept",
    "merged_model_bytes": "merged model",
    "reference_cache_bytes": "reference cache",
}


def rendered(plan: Plan) -> RenderableType:
    """All tables of a plan; about one screen."""
    outcome = plan.outcome
    return Group(
        _heading(plan),
        _memory(plan),
        _moved(outcome),
        _verdict(plan),
        _files(plan),
        *_changes(plan),
        Text("Assumed: " + "; ".join(plan.assumptions) + "."),
    )


def _heading(plan: Plan) -> Text:
    structure, cluster = plan.structure, plan.outcome.setting.cluster
    gpus = f"{cluster.nodes} x {cluster.gpus} {cluster.gpu.name}, {_gb(cluster.gpu_memory_bytes)} GB each"
    return Text(
        f"{plan.recipe_name}: {structure.num_base:,} parameters in {structure.num_layers} layers, "
        f"{structure.num_lora:,} trained; {gpus}; deepspeed: {plan.outcome.setting.deepspeed}. GB are 10^9 bytes."
    )


def _memory(plan: Plan) -> Table:
    outcome = plan.outcome
    shown = Table(box=None, pad_edge=False)
    for title in ("a GPU", "GB", "host memory, a node", "GB", "disk", "GB"):
        shown.add_column(title, justify="right" if title == "GB" else "left")
    limit = outcome.setting.cluster.host_memory_bytes
    columns = [
        [*_rows(asdict(outcome.gpu), _GPU_ROWS), ("in all: the larger of (a), (b)", _gb(outcome.gpu.total_bytes)),
         ("available", _gb(outcome.setting.cluster.gpu_memory_bytes))],
        [*_rows(asdict(outcome.host), _HOST_ROWS), ("in all", _gb(outcome.host.total_bytes)),
         ("available", "not given" if limit is None else _gb(limit))],
        [*_rows(asdict(plan.disk), _DISK_ROWS)],
    ]  # fmt: skip
    for row in range(max(map(len, columns))):
        cells = [column[row] if row < len(column) else ("", "") for column in columns]
        shown.add_row(*(text for cell in cells for text in cell))
    return shown


def _rows(values: dict[str, int | None], names: dict[str, str]) -> Iterable[tuple[str, str]]:
    for key, name in names.items():
        value = values[key]
        if value is None:
            yield name, "unknown"
        elif value:
            yield name, _gb(value)


def _moved(outcome: Outcome) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("a step")
    for mode in outcome.by_mode:
        shown.add_column(_mode_name(outcome, mode), justify="right")
    rows: dict[str, Any] = {
        "all-gathered on a rank, GB": lambda m: _gb(m.traffic.gathered_bytes),
        "gradients reduced, GB": lambda m: _gb(m.traffic.reduced_bytes),
        "NVLink, into a GPU, GB": lambda m: _gb(m.traffic.nvlink_bytes),
        "network, into a node, GB": lambda m: _gb(m.traffic.network_bytes),
        "PCIe, of a GPU, GB": lambda m: _gb(m.traffic.pcie_bytes),
        "PFLOPs, all ranks": lambda m: f"{m.flops.total / 1e15:.1f}",
        "  of it recomputation": lambda m: f"{m.flops.recomputation / 1e15:.1f}",
        "  of it attention": lambda m: f"{m.flops.attention / 1e15:.1f}",
        "seconds: compute / HBM": lambda m: f"{m.time.compute_seconds:.2f} / {m.time.hbm_seconds:.2f}",
        "seconds: NVLink / network / PCIe": lambda m: (
            f"{m.time.nvlink_seconds:.2f} / {m.time.network_seconds:.2f} / {m.time.pcie_seconds:.2f}"
        ),
        _at_least(outcome): lambda m: f"{m.time.bound_seconds:.2f} ({m.time.bounded_by})",
    }
    for name, value in rows.items():
        shown.add_row(name, *(value(moved) for moved in outcome.by_mode.values()))
    return shown


def _at_least(outcome: Outcome) -> str:
    return f"seconds at least, at {outcome.setting.workload.tokens_per_response} tokens a response"


def _mode_name(outcome: Outcome, mode: str) -> str:
    if mode == "cached" and outcome.setting.workload.reference == "none":
        return "no reference"
    name = "cached reference" if mode == "cached" else mode
    return f"{name} *" if mode == outcome.mode else name


def _verdict(plan: Plan) -> Text:
    outcome = plan.outcome
    verdicts = ["Ruled out: " + "; ".join(outcome.problems) + "."] if outcome.problems else []
    lacking = _lacking(outcome)
    if lacking:
        verdicts.append("Does not fit: " + "; ".join(lacking) + ".")
    if verdicts:
        return Text(" ".join(verdicts), style="bold red")
    host = "" if outcome.host_spare_bytes is None else f", {_gb(outcome.host_spare_bytes)} GB of a node's host memory"
    return Text(f"Fits: {_gb(outcome.gpu_spare_bytes)} GB of each GPU to spare{host}.", style="bold green")


def _lacking(outcome: Outcome) -> list[str]:
    """Which memory is too small, and the amount that is lacking."""
    found = []
    if outcome.gpu_spare_bytes < 0:
        found.append(f"a GPU lacks {_gb(-outcome.gpu_spare_bytes)} GB")
    if (outcome.host_spare_bytes or 0) < 0:
        found.append(f"a node's host memory lacks {_gb(-(outcome.host_spare_bytes or 0))} GB")
    return found


def _files(plan: Plan) -> Group:
    shown = _alternatives("ds_configs/", plan.files, name=lambda a: _file_name(plan, a))
    best = plan.best_file
    if best is None:
        advice = "No file of ds_configs/ fits if the recipe is otherwise unchanged."
    elif best.changes:
        advice = f"Take {' '.join(best.changes)}."
    else:
        advice = f"Take {best.outcome.setting.deepspeed}, which the recipe has."
    return Group(shown, Text(advice, style="bold"))


def _file_name(plan: Plan, alternative: Alternative) -> str:
    others = [change for change in alternative.changes if not change.startswith("deepspeed=")]
    return " ".join([alternative.outcome.setting.deepspeed, *others])


def _changes(plan: Plan) -> Iterable[RenderableType]:
    if plan.remedies:
        yield _alternatives("what to change, cheapest first", plan.remedies[:12], name=lambda a: " ".join(a.changes))
    if plan.combination is not None:
        yield _alternatives("together", (plan.combination,), name=lambda a: " ".join(a.changes))
    elif not plan.outcome.fits and not any(remedy.outcome.fits for remedy in plan.remedies):
        setting = plan.outcome.setting
        most = max((setting.cluster, *larger_clusters(setting)), key=lambda cluster: cluster.ranks)
        yield Text(f"Nothing that is known fits, on up to {most.nodes} x {most.gpus} GPUs.", style="bold red")


def _alternatives(title: str, alternatives: Iterable[Alternative], *, name: Any) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column(title)
    for column in ("a GPU, GB", "spare", "host, GB", "seconds at least", ""):
        shown.add_column(column, justify="right")
    for alternative in alternatives:
        outcome = alternative.outcome
        verdict = "fits" if outcome.fits else "ruled out" if outcome.problems else "does not fit"
        shown.add_row(
            name(alternative),
            _gb(outcome.gpu.total_bytes),
            _gb(outcome.gpu_spare_bytes),
            _gb(outcome.host.total_bytes),
            f"{outcome.bound_seconds:.2f}",
            verdict,
        )
    return shown


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f}" if abs(num_bytes) >= GB / 20 or num_bytes == 0 else f"{num_bytes / GB:.3f}"


# ---- JSON


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; keys end in their unit and are stable between versions."""
    outcome, structure = plan.outcome, plan.structure
    workload, cluster = outcome.setting.workload, outcome.setting.cluster
    best = plan.best_file
    return {
        "recipe": plan.recipe_name,
        "fits": outcome.fits,
        "problems": list(outcome.problems),
        "lacking": _lacking(outcome),
        "parameters": {
            "base": structure.num_base,
            "lora": structure.num_lora,
            "layers": structure.num_layers,
        },
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus,
            "gpu": cluster.gpu.name,
            "gpu_memory_bytes": cluster.gpu_memory_bytes,
            "host_memory_bytes": cluster.host_memory_bytes,
            "flops_per_second": cluster.gpu.flops_per_second,
            "hbm_bytes_per_second": cluster.gpu.hbm_bytes_per_second,
            "nvlink_bytes_per_second": cluster.gpu.nvlink_bytes_per_second,
            "pcie_bytes_per_second": cluster.gpu.pcie_bytes_per_second,
            "network_bytes_per_second": cluster.network_bytes_per_second,
        },
        "deepspeed": outcome.setting.deepspeed,
        "best_deepspeed": None if best is None else best.outcome.setting.deepspeed,
        "best_changes": None if best is None else list(best.changes),
        "gpu_memory": asdict(outcome.gpu)
        | {"total_bytes": outcome.gpu.total_bytes, "spare_bytes": outcome.gpu_spare_bytes},
        "host_memory": asdict(outcome.host)
        | {"total_bytes": outcome.host.total_bytes, "spare_bytes": outcome.host_spare_bytes},
        "disk": asdict(plan.disk),
        "step": {
            "responses": workload.examples_per_step,
            "tokens": workload.tokens_per_step,
            "micro_steps": workload.micro_steps(cluster.ranks),
            "tokens_per_micro_batch": workload.largest_micro_batch,
            "mode": outcome.mode,
            "mfu_flops": plan.mfu_flops,
            "by_mode": {
                mode: {
                    "traffic": _traffic(moved.traffic),
                    "flops": asdict(moved.flops) | {"total": moved.flops.total},
                    "time": asdict(moved.time)
                    | {"bound_seconds": moved.time.bound_seconds, "bounded_by": moved.time.bounded_by},
                }
                for mode, moved in outcome.by_mode.items()
            },
        },
        "deepspeed_files": [_alternative(file) for file in plan.files],
        "remedies": [_alternative(remedy) for remedy in plan.remedies],
        "combination": None if plan.combination is None else _alternative(plan.combination),
        "assumptions": list(plan.assumptions),
    }


def _traffic(traffic: Traffic) -> dict[str, int]:
    return asdict(traffic)


def _alternative(alternative: Alternative) -> dict[str, Any]:
    outcome = alternative.outcome
    return {
        "changes": list(alternative.changes),
        "deepspeed": outcome.setting.deepspeed,
        "fits": outcome.fits,
        "problems": list(outcome.problems),
        "lacking": _lacking(outcome),
        "gpu_bytes": outcome.gpu.total_bytes,
        "gpu_spare_bytes": outcome.gpu_spare_bytes,
        "host_bytes": outcome.host.total_bytes,
        "bound_seconds": outcome.bound_seconds,
    }
