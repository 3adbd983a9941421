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


def fast_functions(text: str) -> set[str]:
    """Functions of a test file of which `make test` runs a case at least: their mark, if any, is of other cases."""
    if re.search(r"^pytestmark = pytest\.mark\.long$", text, re.M):
        return set()
    marked = re.findall(r"((?:^[@ )].*\n)*)^def (test_\w+)", text, re.M)
    return {name for marks, name in marked if not re.search(r"^@pytest\.mark\.long\b", marks, re.M)}


FAST = set().union(*map(fast_functions, FILES.values()))


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
    """`make test` alone would see it broken: a function that is not marked long, or a file that has one."""
    assert "test_a_killed_run_goes_on_bit_for_bit" in FAST
    assert "test_a_run_that_is_killed_again_and_again" not in FAST
    with_fast = {name for name, text in FILES.items() if fast_functions(text)}
    for number, invariant, tests in ROWS:
        named = named_tests(tests)
        fast = [name for name in named if name in FAST or name.rpartition("/")[2] in with_fast]
        assert fast, f"invariant {number}: of {named} none is fast: {invariant}"


def test_the_main_job_is_fast() -> None:
    """`make test-lowest` runs what is not long of it: a test that is long would silently be left out."""
    names = re.findall(r"test_\w+\.py::(test_\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(names) >= 6
    assert [name for name in names if name not in FAST] == []
