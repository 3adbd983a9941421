"""Rows of a data folder, read before lm-evaluation-harness reads them: it names neither the file nor the line.

A column that one row lacks would be an empty text in a prompt, without a word; an instruction that is not known would
end the evaluation after all questions were answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.local import LocalTask
from uft_ds.host.files import read_regular_text


def check_rows(tasks: Iterable[LocalTask]) -> None:
    """Refuse files of rows that a task cannot ask.

    Raises:
        UserError: names the file and the line.
    """
    seen: set[tuple[Path, tuple[str, ...]]] = set()
    for task in tasks:
        for path in task.files.values():
            if (path, task.layout.columns) not in seen:
                seen.add((path, task.layout.columns))
                _check_file(path, task)


def _check_file(path: Path, task: LocalTask) -> None:
    try:
        lines = read_regular_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data: {path}: cannot be read ({error}); fetch the rows of {task.name} again") from None
    columns = task.layout.columns
    expected = f"{task.name} expects an object with {', '.join(columns)}"
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--data: {path}:{number}: no JSON ({error}); {expected}") from None
        if not isinstance(row, dict):
            raise UserError(f"--data: {path}:{number}: found {line[:40]}; {expected}")
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            there = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"--data: {path}:{number}: has no {missing[0]}, found {there}; {expected}")
        fault = task.layout.fault(row)
        if fault is not None:
            raise UserError(f"--data: {path}:{number}: {fault}; {task.name} could not ask or grade it; correct the row")
        count += 1
    if not count:
        raise UserError(f"--data: {path}: has no rows; {expected} in each line")
