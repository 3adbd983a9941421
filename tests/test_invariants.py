"""docs/invariants.md names the tests that hold each invariant: they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
][2:]
FUNCTIONS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


def named_tests(cell: str) -> list[str]:
    return re.findall(r"`((?:tests/|test_)[^`]*)`", cell)


def exists(name: str) -> bool:
    """A test function, a test file by its name or path, or a folder of tests."""
    if name.startswith("tests/"):
        return (ROOT / name).exists()
    if name.endswith(".py"):
        return any((ROOT / "tests").rglob(name))
    return name in FUNCTIONS


def test_every_named_test_exists() -> None:
    """A test that is renamed or moved takes its row along."""
    assert all(len(row) == 3 for row in ROWS)
    names = [name for _, _, tests in ROWS for name in named_tests(tests)]
    assert len(names) > 30
    assert [name for name in names if not exists(name)] == []


def test_every_invariant_names_a_test_function() -> None:
    """Invariants 1 to 9, 11 and 12, each in a row of its own with at least one function; other rows name tests too."""
    alone = {number: tests for number, _, tests in ROWS if number.isdigit()}
    assert sorted(alone, key=int) == [*"123456789", "11", "12"]
    for number, tests in alone.items():
        assert set(named_tests(tests)) & FUNCTIONS, f"invariant {number}"
    assert all(named_tests(tests) for _, _, tests in ROWS)
