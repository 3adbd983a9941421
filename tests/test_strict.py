"""A skipped test fails under UFT_TEST_STRICT, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SKIPPING = """
import needs
import pytest

def test_in_the_test():
    needs.package("a_package_that_is_not_there")

@pytest.fixture
def slurm():
    needs.missing("Slurm", "apt-get brings it", "first line\\nE: no index")

def test_in_a_fixture(slurm):
    pass

@pytest.mark.skip(reason="by a mark")
def test_by_a_mark():
    pass

def test_that_passes():
    pass
"""
SKIPPED_MODULE = 'import needs\nneeds.package("a_package_that_is_not_there")\ndef test_it():\n    pass\n'
REASONS = (
    "no package a_package_that_is_not_there; pip install '.[dev]' brings it",
    "no Slurm (E: no index); apt-get brings it",
    "by a mark",
)


def run_pytest(folder: Path, source: str, strict: str) -> tuple[int, str]:
    """Exit code and output of pytest on one file."""
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "strict", "-p", "no:cacheprovider", "-q", "-rsE", "-c", os.devnull]
    environment = os.environ | {"UFT_TEST_STRICT": strict, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "COLUMNS": "200"}
    done = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("strict", ["", "0"])
def test_without_it_a_skip_is_seen_with_its_reason(tmp_path: Path, strict: str) -> None:
    """A machine without a package, or without Slurm: three tests are skipped, each with the remedy; no failure."""
    code, output = run_pytest(tmp_path, SKIPPING, strict)
    assert code == 0, output
    assert "1 passed, 3 skipped" in output
    assert all(reason in output for reason in REASONS), output


def test_with_it_a_skip_fails(tmp_path: Path) -> None:
    """In a test, a fixture (an error) and a mark; the test that needs nothing passes."""
    code, output = run_pytest(tmp_path, SKIPPING, "1")
    assert code == 1, output
    assert "1 passed" in output
    assert "skipped" not in output.splitlines()[-1]
    for reason in REASONS:
        assert f"UFT_TEST_STRICT is set, and this would be skipped: {reason}" in output, output


def test_with_it_a_module_that_skips_itself_fails(tmp_path: Path) -> None:
    """All tests of the module are missing then: pytest ends with an error of collection."""
    code, output = run_pytest(tmp_path, SKIPPED_MODULE, "1")
    assert code == 2, output
    assert f"this would be skipped: {REASONS[0]}" in output
