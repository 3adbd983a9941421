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
FILES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
FUNCTIONS = {name for text in FILES.values() for name in re.findall(r"^def (test_\w+)", text, re.M)}
WHOLLY_LONG = {name for name, text in FILES.items() if re.search(r"^pytestmark = pytest\.mark\.long$", text, re.M)}
FAST = {
    name
    for file in FILES.keys() - WHOLLY_LONG
    for marks, name in re.findall(r"((?:^[@ )].*\n)*)^def (test_\w+)", FILES[file], re.M)
    if "@pytest.mark.long\n" not in marks
}
"""Functions of which `make test` runs a case at least: their mark, if they have one, is of other cases."""


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


def test_every_invariant_has_a_fast_test() -> None:
    """`make test` alone would see it broken: a function that is not marked long, in a file that is not."""
    assert "test_a_killed_run_goes_on_bit_for_bit" in FAST
    assert "test_a_run_that_is_killed_again_and_again" not in FAST
    for number, _, tests in ROWS:
        named = set(named_tests(tests)) & FUNCTIONS
        if number and named:
            assert named & FAST, f"invariant {number}: of {sorted(named)} none is in the fast suite"
