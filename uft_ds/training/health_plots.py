"""health.png: whether the implicit scores mean what they should, from the metrics and the newest held-out table."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.data.example import KINDS, Kind
from uft_ds.training.curves import KIND_COLORS, draw
from uft_ds.training.telemetry import calibration, implicit_scores, sides

_MOST_POINTS = 2000


def write_health(lines: Seq[dict[str, Any]], rows: np.ndarray, path: Path) -> None:
    """Six pictures as one PNG.

    Args:
        lines: of metrics.jsonl.
        rows: the table of the held-out responses; empty where nothing is held out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (reliability, length, margins), (ranks, saturation, sides_over_time) = figure.subplots(2, 3)
    compared = rows[np.isfinite(rows["log_ratio"])]
    _draw_reliability(reliability, compared)
    _draw_length(length, compared)
    _draw_margins(margins, compared)
    for kind, color in KIND_COLORS.items():
        draw(ranks, lines, f"held_out/rank_correlation/{kind}", label=f"{kind}: rank", color=color, marker="o")
        draw(saturation, lines, f"saturated_fitted/{kind}", label=f"{kind}: fitted", color=color, alpha=0.4)
        draw(saturation, lines, f"saturated_stuck/{kind}", label=f"{kind}: stuck", color=color)
    draw(ranks, lines, "held_out/pair_accuracy/pair", label="pair: accuracy", color="tab:red", linestyle="--")
    is_rewarded = any("implicit_reward_chosen/pair" in line for line in lines)
    for side, style in (("chosen", "-"), ("rejected", ":")):
        # Without a reference there are no rewards.
        name = f"implicit_reward_{side}/pair" if is_rewarded else f"logp_{side}/pair"
        draw(sides_over_time, lines, name, label=side, color="tab:red", linestyle=style)
    of_sides = "implicit reward" if is_rewarded else "log-prob (nats)"
    for axes, title, x, y in (
        (reliability, "held out: calibration", "implicit score", "given score"),
        (length, "held out: length bias", "tokens of the response", "log-ratio (nats)"),
        (margins, "held out: margins of pairs", "implicit reward, chosen - rejected", "pairs"),
        (ranks, "held out: order", "step", "rank correlation, accuracy"),
        (saturation, "training: without gradient", "step", "share of responses"),
        (sides_over_time, "training: the sides of pairs", "step", of_sides),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
        else:
            axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes, color="gray")
    figure.savefig(path, dpi=110)


def _of_kinds(rows: np.ndarray) -> list[tuple[Kind, np.ndarray]]:
    found = [(kind, rows[rows["kind"] == code]) for code, kind in enumerate(KINDS)]
    return [(kind, of_kind) for kind, of_kind in found if len(of_kind)]


def _draw_reliability(axes: Any, rows: np.ndarray) -> None:
    """A calibrated policy lies on the diagonal; the area of a point is its number of responses."""
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    for kind, of_kind in _of_kinds(rows):
        bins = calibration(implicit_scores(of_kind), of_kind["score"])
        areas = [20 + 200 * number / len(of_kind) for number, _, _ in bins]
        axes.scatter(*zip(*[pair for _, *pair in bins], strict=True), s=areas, color=KIND_COLORS[kind], label=kind)


def _draw_length(axes: Any, rows: np.ndarray) -> None:
    for kind, of_kind in _of_kinds(rows):
        some = of_kind[:: max(1, len(of_kind) // _MOST_POINTS)]
        axes.scatter(some["tokens"], some["log_ratio"], s=8, alpha=0.5, color=KIND_COLORS[kind], label=kind)


def _draw_margins(axes: Any, rows: np.ndarray) -> None:
    chosen, rejected = sides(rows)
    if len(chosen):
        margins = chosen["reward"] - rejected["reward"]
        axes.hist(margins, bins=30, color="tab:red", alpha=0.7, label=f"{np.mean(margins > 0):.0%} above 0")
        axes.axvline(0, color="black", linewidth=0.8)
