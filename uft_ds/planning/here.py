"""A run's memory as `uft plan` counts it, compared with the machine at hand."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.host.gpus import known_gpus
from uft_ds.kernels.tiles import CPU
from uft_ds.planning.hardware import GB, Figures, cluster_of
from uft_ds.planning.planner import Planner, Setting
from uft_ds.planning.shapes import model_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.settings import Settings

_CPU_PROCESS_BYTES = GB
"""Python, torch and DeepSpeed of a rank without a GPU; 0.6 GB measured, the tiny model included."""


def memory_note(settings: Settings, ranks: int) -> str:
    """A sentence on the memory of a step's peak, for `ranks` ranks on this machine, and what it has.

    Raises:
        UserError: the model's config is not available.
    """
    config, _ = model_config(settings.model.base, settings.model.revision)
    cluster = cluster_of(nodes=1, gpus=ranks, gpu=next(iter(known_gpus())), figures=Figures(network_gbits=400))
    name = settings.deepspeed.name
    workload = workload_of(settings, config, tokens_per_response=None)
    if not torch.cuda.is_available():
        workload = replace(workload, logits_bytes=workload.logits_bytes or CPU.chunk_bytes)
    outcome = Planner(config).plan(Setting(workload, name, sharding_of(read_deepspeed_file(name)), cluster))
    if torch.cuda.is_available():
        total = min(torch.cuda.mem_get_info(device)[1] for device in range(torch.cuda.device_count()))
        needed, what = outcome.gpu.total_bytes, f"a GPU, of {total / GB:.1f} GB"
    else:
        total = psutil.virtual_memory().available
        # Everything is in host memory here; the reserve is that of CUDA.
        held = replace(outcome.gpu, reserve_bytes=0).total_bytes + _CPU_PROCESS_BYTES
        needed = ranks * held + outcome.host.total_bytes - outcome.host.processes_bytes
        what = f"{ranks} ranks together, of {total / GB:.1f} GB that are free"
    fits = "" if needed <= total else "; it does not fit: `uft plan` says what to change"
    return f"memory: at most about {needed / GB:.1f} GB for {what}, as `uft plan` counts{fits}"
