"""curves.png: loss, reward and gradient norm over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from uft_ds.record.panels import KIND_COLORS, Panel, draw, new_figure, write_panels


def write_curves(lines: Seq[dict[str, Any]], path: Path) -> tuple[Panel, ...]:
    """Write a PNG with loss, implicit reward or a reward model's by kind, if there is one, and gradient norm.

    Of an online run also with the scores of the policy's answers, and with those of `evaluate.tasks`.

    Args:
        lines: of metrics.jsonl.
    Returns:
        each picture by itself.
    """
    figure = new_figure()
    loss, reward, norm, score, graded = figure.subplots(1, 5)
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
    tasks = sorted({name for line in lines for name in line if name.startswith("tasks/") and name.endswith("/score")})
    for task in tasks:
        draw(graded, lines, task, label=task.split("/")[1], marker="o")
    titles = (
        (loss, "loss"),
        (reward, of_reward),
        (norm, "gradient norm"),
        (score, "scores of the policy's answers"),
        (graded, "score of tasks"),
    )
    for axes, title in titles:
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    # Without a reference there is no reward. The loss stays, so that every run has this picture.
    for axes in (reward, norm, score, graded):
        if not axes.lines:
            axes.remove()
    return write_panels(figure, figure.axes, path, height=3.6)
