"""A comparison as text: Markdown for people, LaTeX for a paper, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from uft_ds.evaluation.columns import NEW, OLD, Column
from uft_ds.evaluation.comparison.compare import Comparison, Tax
from uft_ds.evaluation.comparison.paired import LEVEL, RESAMPLES, Difference

NONE = "-"
SIGNIFICANT = 0.05
Rows = list[list[str]]


def main_table(found: Comparison) -> Rows:
    """Header and one row a model: the values of all columns, a board's average behind its columns.

    A value that differs from that of `against` with an adjusted p below 0.05 has a star.
    """
    heads, rows = ["model"], [[name] for name in found.names]
    for place, column in enumerate(found.columns):
        heads.append(_head(column, found))
        for row, name in zip(rows, found.names, strict=True):
            row.append(_value(column, found.values[name][column.name]) + _star(found, name, column))
        following = found.columns[place + 1].board if place + 1 < len(found.columns) else None
        if column.board in (NEW, OLD) and following != column.board:
            heads.append(f"average, {column.board}")
            for row, name in zip(rows, found.names, strict=True):
                average = found.averages[name].get(column.board)
                row.append(NONE if average is None else f"{100 * average:.2f}")
    return [heads, *rows]


def difference_table(found: Comparison) -> Rows:
    """Header and one row a column: each model minus `against`, its interval and adjusted p."""
    others = [name for name in found.names if name != found.against]
    rows = [
        [column.name, *(_difference(column, found.differences[name][column.name]) for name in others)]
        for column in found.columns
    ]
    return [["task", *(f"{name} - {found.against}" for name in others)], *rows]


def tax_table(found: Comparison) -> Rows:
    """Header and one row a task that alignment can cost: each model minus what it was trained from; then the taxes.

    Empty where no origin was named.
    """
    taxes = [(name, tax) for name in found.names for tax in found.taxes[name].values()]
    if not taxes:
        return []
    rows = [
        [column.name, *(_change(found, name, tax, column) for name, tax in taxes)]
        for column in found.columns
        if column.is_taxed
    ]
    rows.append(["tasks that both have", *(str(tax.columns) for _, tax in taxes)])
    rows.append(["alignment tax (mean loss)", *(_points(tax.lost, sign=False) for _, tax in taxes)])
    rows.append(["mean loss by chance alone", *(_by_chance(tax) for _, tax in taxes)])
    rows.append(["mean change", *(_points(tax.changed, sign=True) for _, tax in taxes)])
    return [["task", *(f"{name} - {tax.origin}" for name, tax in taxes)], *rows]


def notes(found: Comparison) -> list[str]:
    """What a reader of the tables must know, one sentence each."""
    said = [
        f"Shares in percent. * differs from {found.against}: p < {SIGNIFICANT} by a sign-flip test over the same "
        "items, adjusted for the number of columns (Holm).",
        f"Brackets: {LEVEL:.0%} paired bootstrap interval ({RESAMPLES:,} resamples).",
    ]
    if any(difference is None for of_one in found.differences.values() for difference in of_one.values()):
        said.append(
            "No interval where the models did not answer the same items, or where the number is no mean over items."
        )
    said += [
        f"{name}: judged by {judge}; numbers by another judge cannot be compared with it."
        for name, judge in found.judges.items()
    ]
    if any(taxes for taxes in found.taxes.values()):
        said.append(
            "A mean loss counts no gain, so that of two equal models is above 0, too: by chance alone is what it would "
            "be if a coin had decided which of both has the better answer to each item, over tasks with pairs."
        )
    said += [f"{cut}." for cut in found.cut]
    if found.unlike:
        said.append("Not evaluated alike: " + "; ".join(found.unlike) + ".")
    return said


def markdown(found: Comparison) -> str:
    """All tables and notes."""
    parts = ["# Comparison", _markdown_table(main_table(found))]
    parts += [f"## Differences from {found.against}", _markdown_table(difference_table(found))]
    if taxes := tax_table(found):
        parts += ["## Alignment tax", "In points, against what each model was trained from.", _markdown_table(taxes)]
    parts += ["\n".join(f"* {note}" for note in notes(found))]
    return "\n\n".join(parts) + "\n"


def latex(found: Comparison) -> str:
    """The main table and the tax, for `booktabs`."""
    return "\n".join(_latex_table(rows) for rows in (main_table(found), tax_table(found)) if rows)


def as_json(found: Comparison) -> str:
    """All numbers unrounded; an interval without an end is null."""
    return json.dumps(_finite(asdict(found)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _head(column: Column, found: Comparison) -> str:
    return f"{column.name} (judge: {found.judges[column.name]})" if column.name in found.judges else column.name


def _value(column: Column, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.2f}" if column.is_share else f"{value:.2f}"


def _star(found: Comparison, name: str, column: Column) -> str:
    difference = found.differences.get(name, {}).get(column.name)
    return "*" if difference is not None and difference.p < SIGNIFICANT else ""


def _difference(column: Column, difference: Difference | None) -> str:
    if difference is None:
        return NONE
    scale = 100 if column.is_share else 1
    interval = f"[{scale * difference.low:+.2f}, {scale * difference.high:+.2f}]"
    return f"{scale * difference.mean:+.2f} {interval} p={difference.p:.3g}"


def _change(found: Comparison, name: str, tax: Tax, column: Column) -> str:
    ours, theirs = found.values[name][column.name], found.values[tax.origin][column.name]
    if ours is None or theirs is None:
        return NONE
    difference = tax.differences[column.name]
    change = f"{100 * (ours - theirs):+.2f}"
    return change if difference is None else f"{change} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"


def _by_chance(tax: Tax) -> str:
    points = _points(tax.lost_by_chance, sign=False)
    return points if tax.paired in (0, tax.columns) else f"{points} ({tax.paired} of {tax.columns} tasks)"


def _points(share: float | None, *, sign: bool) -> str:
    if share is None:
        return NONE
    return f"{100 * share:+.2f}" if sign else f"{100 * share:.2f}"


def _markdown_table(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])


def _latex_table(rows: Rows) -> str:
    lines = [" & ".join(_latex_text(cell) for cell in row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end, ""])


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(part) for part in value]
    return value
