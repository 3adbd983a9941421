"""health.png: pictures that show whether implicit scores are meaningful, from metrics and the newest held-out table."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uft_ds.data.example import KINDS, Kind
from uft_ds.record.panels import KIND_COLORS, Panel, draw, new_figure, write_panels
from uft_ds.record.telemetry import calibration, sides, targets
from uft_ds.record.verdict import HELD_OUT, has_held_out

_MOST_POINTS = 2000
"""The most points of a scatter plot for one kind, approximately."""

Lines = Seq[dict[str, Any]]
Labels = tuple[str, str, str]
"""The title and the labels of the x and y axes."""


class Health(NamedTuple):
    """What write_health has drawn. missing: in a sentence or two, what one would expect to see there; mostly empty."""

    panels: tuple[Panel, ...]
    missing: str


class _Picture(NamedTuple):
    """draw: fills axes that are empty, and leaves them so without numbers. metrics: of which at least one is drawn."""

    draw: Callable[[Any, Lines, np.ndarray], Labels]
    metrics: tuple[str, ...]


def write_health(lines: Lines, rows: np.ndarray, path: Path) -> Health:
    """Write up to nine pictures as one PNG. Without held-out data they show the responses that were trained on.

    Pictures of which the run has no numbers are left out. Without any there is no file.

    Args:
        lines: of metrics.jsonl.
        rows: the table of the held-out responses; empty without held-out data.
    """
    figure = new_figure()
    shown, undefined = [], []
    for axes, picture in zip(figure.subplots(3, 3).flat, _PICTURES, strict=True):
        title, x, y = picture.draw(axes, lines, rows)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
            shown.append(axes)
        else:
            axes.remove()
            undefined += [title] if _is_expected(lines, title, picture.metrics) else []
    missing = _missing(lines, undefined)
    if not shown:
        path.unlink(missing_ok=True)
        return Health((), missing)
    return Health(write_panels(figure, shown, path, height=10 / 3, note=missing), missing)


def _is_expected(lines: Lines, title: str, metrics: Seq[str]) -> bool:
    """Whether the run has metrics of a picture, be they null."""
    prefix = "" if title.startswith("training") else HELD_OUT
    names = {f"{prefix}{metric}/{kind}" for metric in metrics for kind in KINDS}
    names.discard(f"{prefix}rank_correlation/instruction")  # all scores are 1: there never is an order
    return any(name in line for line in lines for name in names)


def _missing(lines: Lines, undefined: Seq[str]) -> str:
    """undefined: the titles of pictures that are left out though the run has metrics of them."""
    names = {name for line in lines for name in line}
    unseen = [kind for kind in KINDS if f"responses/{kind}" in names and f"{HELD_OUT}responses/{kind}" not in names]
    sentences = []
    if unseen and has_held_out(lines):
        sentences.append(f"Trained on, but not held out: responses of kind {', '.join(unseen)}.")
    if undefined:
        sentences.append(f"Without a finite number: {', '.join(undefined)}.")
    return " ".join(sentences)


def _draw_reliability(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    """The points of a calibrated policy lie on the diagonal; a point's area grows with its number of responses."""
    if not len(rows):
        return _draw_over_steps(axes, lines, "score_error", "score error", "mean |implicit - given score|")
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    for kind, of_kind in _of_kinds(rows[np.isfinite(rows["implicit_score"])]):
        bins = calibration(of_kind["implicit_score"], targets(of_kind))
        areas = [20 + 200 * number / len(of_kind) for number, _, _ in bins]
        axes.scatter(*zip(*[pair for _, *pair in bins], strict=True), s=areas, color=KIND_COLORS[kind], label=kind)
    return "held out: reliability", "implicit score", "given score"


def _draw_calibration_error(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    return _draw_over_steps(axes, lines, "calibration_error", "calibration", "calibration error")


def _draw_order(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    part, prefix, style = _part(lines)
    for kind, color in KIND_COLORS.items():
        draw(axes, lines, f"{prefix}rank_correlation/{kind}", label=f"{kind}: rank", color=color, **style)
    accuracy = f"{prefix}pair_accuracy/pair"
    draw(axes, lines, accuracy, label="pair: accuracy", color="tab:red", linestyle="--", **style)
    return f"{part}: order", "step", "rank correlation, accuracy"


def _draw_length(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    if not len(rows):
        return _draw_over_steps(axes, lines, "length_correlation", "length bias", "rank correlation with length")
    # A reward model has rewards without log-ratios.
    column, y = ("log_ratio", "log-ratio (nats)") if np.isfinite(rows["log_ratio"]).any() else ("reward", "reward")
    for kind, of_kind in _of_kinds(rows[np.isfinite(rows[column])]):
        some = of_kind[:: max(1, len(of_kind) // _MOST_POINTS)]
        axes.scatter(some["tokens"], some[column], s=8, alpha=0.5, color=KIND_COLORS[kind], label=kind)
    return "held out: length bias", "tokens of the response", y


def _draw_log_ratio_per_token(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    return _draw_over_steps(
        axes, lines, "log_ratio_per_token", "distance from the reference", "log-ratio a token (nats)"
    )


def _draw_saturation(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    for kind, color in KIND_COLORS.items():
        draw(axes, lines, f"saturated_fitted/{kind}", label=f"{kind}: fitted", color=color, alpha=0.4)
        draw(axes, lines, f"saturated_stuck/{kind}", label=f"{kind}: stuck", color=color)
    return "training: without gradient (mse, l1)", "step", "share of responses"


def _draw_margins(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    if not len(rows):
        return _draw_over_steps(axes, lines, "pair_margin", "margins of pairs", "the loss's reward, chosen - rejected")
    chosen, rejected = sides(rows)
    margins = chosen["pair_reward"] - rejected["pair_reward"]
    margins = margins[np.isfinite(margins)]
    if len(margins):
        axes.hist(margins, bins=30, color="tab:red", alpha=0.7, label=f"{np.mean(margins > 0):.0%} above 0")
        axes.axvline(0, color="black", linewidth=0.8)
    return "held out: margins of pairs", "the loss's reward, chosen - rejected", "pairs"


def _draw_rewards_of_sides(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    name = "reward" if any("reward_chosen/pair" in line for line in lines) else "implicit_reward"
    return _draw_sides(axes, lines, name, "rewards", "the loss's reward")


def _draw_logps_of_sides(axes: Any, lines: Lines, rows: np.ndarray) -> Labels:
    return _draw_sides(axes, lines, "logp", "log-probs", "log-prob (nats)")


def _draw_sides(axes: Any, lines: Lines, name: str, title: str, y: str) -> Labels:
    for side, style in (("chosen", "-"), ("rejected", ":")):
        draw(axes, lines, f"{name}_{side}/pair", label=side, color="tab:red", linestyle=style)
    return f"training: {title} of the pairs' sides", "step", y


def _draw_over_steps(axes: Any, lines: Lines, name: str, title: str, y: str) -> Labels:
    """Draw one metric of each kind over the steps."""
    part, prefix, style = _part(lines)
    for kind, color in KIND_COLORS.items():
        draw(axes, lines, f"{prefix}{name}/{kind}", label=kind, color=color, **style)
    return f"{part}: {title}", "step", y


def _part(lines: Lines) -> tuple[str, str, dict[str, Any]]:
    """Which data the metrics over steps describe, the prefix of their names, and the style of their lines."""
    if has_held_out(lines):
        return "held out", "held_out/", {"marker": "o"}
    return "training", "", {"alpha": 0.7}


def _of_kinds(rows: np.ndarray) -> list[tuple[Kind, np.ndarray]]:
    found = [(kind, rows[rows["kind"] == code]) for code, kind in enumerate(KINDS)]
    return [(kind, of_kind) for kind, of_kind in found if len(of_kind)]


_PICTURES = (
    _Picture(_draw_reliability, ("score_error",)),
    _Picture(_draw_calibration_error, ("calibration_error",)),
    _Picture(_draw_order, ("rank_correlation", "pair_accuracy")),
    _Picture(_draw_length, ("length_correlation",)),
    _Picture(_draw_log_ratio_per_token, ("log_ratio_per_token",)),
    _Picture(_draw_saturation, ("saturated_stuck",)),
    _Picture(_draw_margins, ("pair_margin",)),
    _Picture(_draw_rewards_of_sides, ("implicit_reward_chosen", "reward_chosen")),
    _Picture(_draw_logps_of_sides, ("logp_chosen",)),
)
