"""A plan as plain values, for programs: keys end in their unit and are stable between versions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from uft_ds.planning.alternatives import Alternative
from uft_ds.planning.duration import Duration
from uft_ds.planning.plan import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """The figures of the tables, by name."""
    outcome, structure = plan.outcome, plan.structure
    workload, cluster = outcome.setting.workload, outcome.setting.cluster
    answer = plan.answer
    return {
        "recipe": plan.recipe_name,
        "fits": outcome.fits,
        "problems": list(outcome.problems),
        "lacking": outcome.lacking,
        "parameters": {
            "base": structure.num_base,
            "active": structure.num_active,
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
            "assumed": cluster.assumed,
        },
        "deepspeed": outcome.setting.deepspeed,
        "best_deepspeed": None if answer is None else answer.outcome.setting.deepspeed,
        "best_changes": None if answer is None else list(answer.changes),
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
                    "traffic": asdict(moved.traffic),
                    "flops": asdict(moved.flops) | {"total": moved.flops.total},
                    "time": asdict(moved.time)
                    | {"bound_seconds": moved.time.bound_seconds, "bounded_by": moved.time.bounded_by},
                }
                for mode, moved in outcome.by_mode.items()
            },
        },
        "run": _run(plan.duration),
        "deepspeed_files": [_alternative(file) for file in plan.files],
        "remedies": [_alternative(remedy) for remedy in plan.remedies],
        "combination": None if plan.combination is None else _alternative(plan.combination),
        "assumptions": list(plan.assumptions),
    }


def _run(duration: Duration) -> dict[str, Any]:
    amount, mfu = duration.amount, duration.mfu
    return {
        "responses": None if amount is None else amount.responses,
        "tokens": None if amount is None else amount.tokens,
        "steps": None if amount is None else amount.steps,
        "epochs": None if amount is None else amount.epochs,
        "counted_from": None if amount is None else amount.counted_from,
        "bound_seconds": duration.bound_seconds,
        "forecast_seconds": duration.forecast_seconds,
        "mfu": mfu.value,
        "mfu_from": mfu.origin,
    }


def _alternative(alternative: Alternative) -> dict[str, Any]:
    outcome = alternative.outcome
    return {
        "changes": list(alternative.changes),
        "deepspeed": outcome.setting.deepspeed,
        "fits": outcome.fits,
        "problems": list(outcome.problems),
        "lacking": outcome.lacking,
        "gpu_bytes": outcome.gpu.total_bytes,
        "gpu_spare_bytes": outcome.gpu_spare_bytes,
        "host_bytes": outcome.host.total_bytes,
        "bound_seconds": outcome.bound_seconds,
    }
