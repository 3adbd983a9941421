"""Tables of measurements, and the bars that they must hold: what benchmarks print before they exit.

Not a benchmark itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `token_logps.py` needs torch alone, where it measures a GPU
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """A claim, what was measured, and whether it holds."""

    claim: str
    value: float
    holds: bool


def at_most(claim: str, value: float, bound: float) -> Bar:
    return Bar(f"{claim} <= {bound:g}", value, value <= bound)  # a NaN does not hold


def report(console: Console, measured: Sequence[Bar], *, held: str = "holds") -> int:
    """Print each bar, with the word `held` if it holds; the number of those that are missed."""
    for bar in measured:
        console.print(f"  {held if bar.holds else 'MISSED':<6}  {bar.claim}: {bar.value:.4g}")
    return sum(not bar.holds for bar in measured)


def table_of(title: str, *columns: str) -> Table:
    """An empty table: names of rows on the left, numbers on the right of their columns."""
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
