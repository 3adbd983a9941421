"""Compilers, and locks that killed builds leave."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from uft_ds.doctor.compiler import check_build_locks, check_compiler, check_ops


def test_a_stale_lock_is_named_and_its_remedy_removes_it(tmp_path: Path) -> None:
    """A lock as torch makes it, its builder gone: a problem; after the remedy's command it is none."""
    folder = tmp_path / "my extensions"
    operation = folder / "py311_cpu" / "fused_adam"
    operation.mkdir(parents=True)
    environ = {"TORCH_EXTENSIONS_DIR": str(folder)}
    assert [finding.state for finding in check_build_locks(environ)] == ["ok"]
    baton = FileBaton(str(operation / "lock"))
    assert baton.try_acquire()
    (building,) = check_build_locks(environ)
    assert (building.state, building.remedy) == ("note", "wait for it")
    assert baton.fd is not None
    os.close(baton.fd)  # what a kill does: the file stays
    (stale,) = check_build_locks(environ)
    assert stale.state == "problem"
    assert str(operation / "lock") in stale.found
    subprocess.run(shlex.split(stale.remedy), check=True)
    assert [finding.state for finding in check_build_locks(environ)] == ["ok"]


@pytest.mark.parametrize(("has_gpus", "state"), [(True, "problem"), (False, "ok")])
def test_a_compiler_is_needed_on_gpus_alone(tmp_path: Path, has_gpus: bool, state: str) -> None:
    """An empty PATH: Triton could not compile; on CPUs nothing would."""
    assert check_compiler(has_gpus, {"PATH": str(tmp_path)}).state == state


def test_cc_may_name_the_compiler_with_options(tmp_path: Path) -> None:
    """CC before gcc."""
    mine = tmp_path / "mycc"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    assert str(mine) in check_compiler(False, {"PATH": str(tmp_path), "CC": "mycc -O1"}).found


def test_prebuilt_ops_are_listed() -> None:
    """Those that are there, and that none is needed."""
    assert "pre-built: cpu_adam; none is needed" in check_ops({"cpu_adam": True, "fused_adam": False}).found
