"""Pictures of several panels: one PNG for the run's folder, and each panel by itself for a page that a phone shows."""

from __future__ import annotations

import io
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from uft_ds.data.example import KINDS

KIND_COLORS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))

_COLUMNS = 3
_INCHES = 4.0
"""The width of a panel."""
_LETTERS = 80
"""Letters of the note that fit below one panel."""
_MARGIN = 6
"""Pixels around a panel that is shown by itself."""


@dataclass(frozen=True)
class Panel:
    """One of the pictures of a file, as a PNG of its own. title: what it shows."""

    title: str
    png: bytes


def new_figure() -> Any:
    """An empty matplotlib figure whose canvas needs no window system, so that it works on a compute node."""
    # matplotlib is slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def draw(axes: Any, lines: Seq[dict[str, Any]], name: str, **style: Any) -> None:
    """Draw one metric over the steps; draw nothing if no line has it."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def write_panels(figure: Any, shown: Seq[Any], path: Path, *, height: float, note: str = "") -> tuple[Panel, ...]:
    """Place pictures in rows of three, in their order, and write them as one PNG.

    Args:
        shown: at least one of the figure's axes; the others have been removed.
        height: of a row, inches.
        note: a text below all of them.
    Returns:
        each picture by itself.
    """
    from matplotlib.image import imsave

    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    text = "\n".join(wrap(note, _LETTERS * columns))
    figure.set_size_inches(_INCHES * columns, height * rows + 0.2 * len(text.splitlines()))
    grid = figure.add_gridspec(rows, columns)
    for number, axes in enumerate(shown):
        axes.set_subplotspec(grid[number])
    if text:
        figure.supxlabel(text, fontsize=8)
    figure.savefig(path)
    pixels = np.asarray(figure.canvas.buffer_rgba())
    panels = []
    for axes in shown:
        png = io.BytesIO()
        imsave(png, np.ascontiguousarray(_part_of(pixels, axes)), format="png")
        panels.append(Panel(axes.get_title(), png.getvalue()))
    return tuple(panels)


def _part_of(pixels: np.ndarray, axes: Any) -> np.ndarray:
    """What a picture and its labels cover: [rows, columns, 4]."""
    box = axes.get_tightbbox()
    top, bottom = len(pixels) - box.y1, len(pixels) - box.y0  # matplotlib counts from below
    first, last, left, right = (round(value) for value in (top, bottom, box.x0, box.x1))
    return pixels[max(0, first - _MARGIN) : last + _MARGIN, max(0, left - _MARGIN) : right + _MARGIN]
