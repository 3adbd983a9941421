"""The results as a page of Markdown, whose tables fit into docs/findings.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(values: Mapping[str, Any]) -> str:
    """The page.

    Args:
        values: those of gpu_check.json.
    """
    to_come = values["stages_to_come"]
    result = f"NOT DONE, {to_come} stages to come," if to_come else "PASSED" if values["passed"] else "FAILED"
    lines = ["# GPU check", "", f"{result} in {values['seconds']:.0f} s.", ""]
    stages = [
        {
            "stage": of["stage"],
            "result": of["how"],
            "seconds": f"{of['seconds']:.0f} of {of['allowed_seconds']:.0f}",
            "problems": len(of["problems"]),
        }
        for of in values["stages"]
    ]
    lines += [*rows_of(stages), ""]
    for of in values["stages"]:
        lines += [f"## {of['stage']}", ""]
        lines += [f"* PROBLEM: {cell(problem)}" for problem in of["problems"]]
        if of["problems"]:
            lines.append("")
        if of["facts"]:
            lines += [*rows_of([{"": name, "value": value} for name, value in of["facts"].items()]), ""]
        for title, rows in of["tables"].items():
            lines += [f"{title[:1].upper()}{title[1:]}:", "", *rows_of(rows), ""]
    return "\n".join(lines)


def rows_of(rows: list[dict[str, Any]]) -> list[str]:
    """A table; its columns are those of all rows, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in table]


def cell(value: Any) -> str:
    """A value in four digits, without what would end a cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
