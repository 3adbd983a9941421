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
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.85, 0.15, 0.35, 0.5
"""Inches between the edge of a panel and its axes, for ticks and labels. To measure them, as matplotlib's own layouts
do, takes most of the time of a report."""


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

    figure = Figure(dpi=110)
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
    width, whole = _INCHES * columns, height * rows + 0.2 * len(text.splitlines())
    figure.set_size_inches(width, whole)
    corners = [(number % columns * _INCHES, whole - height * (number // columns + 1)) for number in range(len(shown))]
    for axes, (x, y) in zip(shown, corners, strict=True):
        inner = (_INCHES - _LEFT - _RIGHT, height - _BOTTOM - _TOP)
        axes.set_position(((x + _LEFT) / width, (y + _BOTTOM) / whole, inner[0] / width, inner[1] / whole))
    if text:
        figure.supxlabel(text, fontsize=8)
    figure.canvas.draw()  # once, for the file and for each picture; `savefig` would draw twice
    pixels = np.asarray(figure.canvas.buffer_rgba())
    imsave(path, pixels, format="png", dpi=figure.dpi)
    panels = []
    for axes, (x, y) in zip(shown, corners, strict=True):
        png = io.BytesIO()
        top = whole - y - height  # pixels are counted from above
        first, last, start, end = (round(figure.dpi * inches) for inches in (top, top + height, x, x + _INCHES))
        imsave(png, np.ascontiguousarray(pixels[first:last, start:end]), format="png")
        panels.append(Panel(axes.get_title(), png.getvalue()))
    return tuple(panels)
