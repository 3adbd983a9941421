"""curves.png: loss, reward and gradient norm over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from uft_ds.data.example import KINDS

KIND_COLORS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))


def write_curves(lines: Seq[dict[str, Any]], path: Path) -> None:
    """Write a PNG with loss, implicit reward or a reward model's by kind, if there is one, and gradient norm.

    Of an online run also with the scores of the policy's answers.

    Args:
        lines: of metrics.jsonl.
    """
    # matplotlib is slow to import; the canvas without a window system works on a compute node.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    loss, reward, norm, score = figure.subplots(1, 4)
    draw(loss, lines, "loss", label="training", color="black", alpha=0.35)
    draw(loss, lines, "held_out/loss", label="held out", color="black", marker="o")
    is_reward_model = any(name.startswith("reward/") for line in lines for name in line)
    name = "reward" if is_reward_model else "implicit_reward"
    for kind, color in KIND_COLORS.items():
        draw(reward, lines, f"{name}/{kind}", label=kind, color=color, alpha=0.5)
        draw(reward, lines, f"held_out/{name}/{kind}", label=f"{kind}, held out", color=color, marker="o")
    draw(norm, lines, "grad_norm", label="before clipping", color="tab:purple")
    draw(score, lines, "rollouts/score", label="mean", color="tab:orange")
    draw(score, lines, "rollouts/truncated", label="share cut", color="tab:gray", alpha=0.5)
    of_reward = "reward" if is_reward_model else "implicit reward (beta x nats)"
    titles = ((loss, "loss"), (reward, of_reward), (norm, "gradient norm"), (score, "scores of the policy's answers"))
    for axes, title in titles:
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    # Without a reference there is no reward. The loss stays, so that every run has this picture.
    for axes in (reward, norm, score):
        if not axes.lines:
            axes.remove()
    lay_out(figure, figure.axes, height=3.6)
    figure.savefig(path, dpi=110)


def draw(axes: Any, lines: Seq[dict[str, Any]], name: str, **style: Any) -> None:
    """Draw one metric over the steps; draw nothing if no line has it."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def lay_out(figure: Any, shown: Seq[Any], *, height: float) -> None:
    """Place pictures in rows of three, in their order. height: of a row, inches."""
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure.set_size_inches(4 * columns, height * rows)
    grid = figure.add_gridspec(rows, columns)
    for number, axes in enumerate(shown):
        axes.set_subplotspec(grid[number])
