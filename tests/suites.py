"""Which cases of a test `make test` runs, and which `make test-long` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

SLOWEST = (
    "slurm/test_jobs.py", "slurm/test_online_jobs.py", "distributed/test_training_run.py",
    "distributed/test_stopping.py", "planning/test_plan_against_deepspeed.py", "run/test_real_data.py",
    "benchmarks/test_gpu_check.py", "distributed/test_divided_runs.py", "distributed/test_resume.py",
    "distributed/test_reference_traffic.py",
    "evaluation/harness/test_harness_run.py", "examples/test_smollm2.py", "doctor/test_command.py",
    "distributed/test_loading.py", "planning/test_plan.py", "distributed/test_online_run.py",
    "training/test_fake_cuda.py", "kernels/test_rows_triton.py", "distributed/test_online_reward_run.py",
    "planning/test_alternatives.py", "rollouts/test_planted_faults.py", "distributed/test_gradient_scale.py",
    "planning/test_activations.py",
    "data/tokens/test_real_tokenizers.py", "data/tokens/test_encoding.py",
)  # fmt: skip
"""Of either suite, by measured seconds; then come those of `FOLDERS`, and all others as they are found."""

FOLDERS = ("distributed", "slurm")


def slowest_first(path: Path) -> int:
    """The place of a test file in the order in which workers are given them."""
    here = Path(__file__).parent
    name = path.relative_to(here).as_posix() if path.is_relative_to(here) else ""
    if name in SLOWEST:
        return SLOWEST.index(name)
    folder = path.parent.name
    return len(SLOWEST) + (FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS))


def long_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """For `parametrize` with one argument, or for a fixture's `params`: all cases, but those of `fast` marked `long`.

    Raises:
        AssertionError: a name of `fast` is no case, so that a case that was renamed is not lost to `make test`.
    """
    given = list(cases)
    assert all(case in given for case in fast), f"{fast} are not all among {given}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.long) for case in given]
