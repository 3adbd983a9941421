"""docs/bad_input.md names the tests that hold each outcome: they exist, and each row has one."""

from __future__ import annotations

import re
from pathlib import Path

from test_invariants import FUNCTIONS, exists, named_tests

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and not re.match(r"\|(-|\s*what is given)", line)
]


def test_every_named_test_exists() -> None:
    """In the text and in the rows; a test that is renamed takes its row along."""
    names = [*re.findall(r"`(test_\w+)`", TEXT), *(name for row in ROWS for name in named_tests(row[-1]))]
    assert len(names) > 100
    assert sorted({name for name in names if not exists(name)}) == []


def test_every_row_names_a_test() -> None:
    """What is given, what happens, and at least one test function or file; no class of input stands there twice."""
    assert all(len(row) == 3 for row in ROWS)
    assert [given for given, _, tests in ROWS if not named_tests(tests)] == []
    assert len({given for given, _, _ in ROWS}) == len(ROWS)


def test_the_findings_count_the_rows() -> None:
    """docs/findings.md says how many classes of input the page has."""
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"\[(\d+) classes\]\(bad_input\.md\), held by (\d+) test functions", findings)
    functions = {name for row in ROWS for name in named_tests(row[-1])} & FUNCTIONS
    assert tuple(map(int, said)) == (len(ROWS), len(functions))
