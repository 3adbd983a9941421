"""All checks of `uft doctor`, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from uft_ds.doctor.caches import check_caches, check_hub
from uft_ds.doctor.compiler import check_build_locks, check_compiler, check_ops
from uft_ds.doctor.disk import check_output, nearest, scratch
from uft_ds.doctor.finding import Finding
from uft_ds.doctor.gpus import TorchBuild, check_gpus, check_peers, check_torch
from uft_ds.doctor.launchers import check_launcher, check_slurm
from uft_ds.doctor.network import (
    check_hostname,
    check_interfaces,
    check_limits,
    check_ports,
    check_shared_memory,
    check_store,
    is_on_many_nodes,
)
from uft_ds.doctor.proofs import REDUCE, TRAIN, prove_all_reduce, prove_training
from uft_ds.doctor.versions import check_flash_attention, check_nf4, check_packages, check_python

OnStage = Callable[[str], None]


def examine(output: Path, *, quick: bool, seconds: float, on_stage: OnStage) -> Iterator[Finding]:
    """Run all checks and yield their findings one by one.

    Args:
        output: where runs will be written; it need not exist.
        quick: leave out the two proofs, which start ranks.
        seconds: time limit for both proofs together.
        on_stage: called with the name of each stage when it begins.
    """
    build, many_nodes = TorchBuild.here(), is_on_many_nodes()
    has_gpus = build.devices > 0
    on_stage("versions")
    yield check_python()
    yield from check_packages()
    yield check_torch(build)
    yield check_flash_attention(has_gpus)
    yield check_nf4(has_gpus)
    on_stage("compiler and ops")
    yield check_compiler(has_gpus)
    yield check_ops()
    yield from check_build_locks()
    on_stage("launchers")
    yield check_launcher("torchrun")
    yield check_launcher("deepspeed")
    yield check_slurm()
    on_stage("network")
    yield from check_interfaces()
    yield check_hostname(many_nodes=many_nodes)
    yield check_store(many_nodes=many_nodes)
    yield check_ports()
    yield check_shared_memory(build.devices)
    yield from check_limits(many_nodes=many_nodes)
    on_stage(f"writing below {nearest(output)}")
    yield from check_output(output)
    yield from check_caches()
    yield check_hub()
    on_stage("GPUs")
    yield from check_gpus()
    yield from check_peers(build.devices)
    if not quick:
        yield from _prove(output, seconds, on_stage)


def _prove(output: Path, seconds: float, on_stage: OnStage) -> Iterator[Finding]:
    deadline = time.monotonic() + seconds
    for name, prove in ((REDUCE, prove_all_reduce), (TRAIN, prove_training)):
        left = deadline - time.monotonic()
        if left <= 0:
            yield Finding(name, "problem", "no time was left for it", "a longer --time-limit")
            continue
        on_stage(name)
        try:
            with scratch(output) as folder:
                finding = prove(folder, seconds=left)
        except OSError as error:
            finding = Finding(
                name, "problem", f"nothing can be written ({error.strerror})", "see the output folder's line"
            )
        yield finding
