"""A comparison as a picture: each model's difference in each column, with its interval."""

from __future__ import annotations

import math
from pathlib import Path

from uft_ds.evaluation.comparison.compare import Comparison
from uft_ds.record.panels import new_figure

_ROW_INCHES, _WIDTH_INCHES = 0.28, 7.0


def write_picture(found: Comparison, path: Path) -> None:
    """Write a PNG. Shares are in points; grades and lengths, which have other scales, are in the tables alone.

    A difference without an interval is a hollow point.
    """
    others = [name for name in found.names if name != found.against]
    columns = [column for column in found.columns if column.is_share]
    figure = new_figure()
    axes = figure.subplots()
    rows = len(columns) * len(others)
    figure.set_size_inches(_WIDTH_INCHES, 1.4 + _ROW_INCHES * (rows + len(columns)))
    for number, name in enumerate(others):
        color = f"C{number}"
        axes.plot([], [], "o", color=color, label=name)
        for place, column in enumerate(columns):
            height = place * (len(others) + 1) + number
            ours, theirs = found.values[name][column.name], found.values[found.against][column.name]
            difference = found.differences[name][column.name]
            if difference is not None and math.isfinite(difference.low):
                axes.plot([100 * difference.low, 100 * difference.high], [height, height], color=color)
            if ours is not None and theirs is not None:
                face = "none" if difference is None else color
                axes.plot([100 * (ours - theirs)], [height], "o", color=color, markerfacecolor=face)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks([place * (len(others) + 1) + (len(others) - 1) / 2 for place in range(len(columns))])
    axes.set_yticklabels([column.name for column in columns])
    axes.invert_yaxis()
    axes.set_xlabel(f"points more than {found.against}, with 95% paired bootstrap intervals")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    figure.savefig(path)
