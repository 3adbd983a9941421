"""Which of two values of a metric is better; `train.keep_best` uses this to keep the best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from uft_ds.data.example import KINDS
from uft_ds.objectives.losses import LOSSES

Best = Literal["lowest", "highest", "nearest to 0"]

BEST: Mapping[str, Best] = {
    **dict.fromkeys(("loss", "score_error", "calibration_error"), "lowest"),
    **dict.fromkeys(
        ("pair_accuracy", "pair_margin", "rank_correlation", "logp_chosen", "implicit_reward_chosen"), "highest"
    ),
    "length_correlation": "nearest to 0",
}
"""The best value by the metric's name between `held_out/` and the kind. Other metrics have no best value."""

_OF_PAIRS = ("pair_accuracy", "pair_margin", "logp_chosen", "implicit_reward_chosen")


def is_of_task(metric: str) -> bool:
    """Whether it is measured by a task of the recipe's `evaluate.tasks`, not on held-out data."""
    return metric.startswith("tasks/")


def best_problem(metric: str, tasks: Sequence[str] = ()) -> str | None:
    """The reason why this metric cannot choose the best checkpoint, or None.

    Args:
        tasks: the names in the recipe's `evaluate.tasks`.
    """
    if is_of_task(metric):
        names = [f"tasks/{name}/score" for name in tasks]
        remedy = f"take {', '.join(names)}" if names else "evaluate.tasks is empty"
        return None if metric in names else f"{metric!r} given, which cannot choose; {remedy}"
    prefix, *parts = metric.split("/")
    if prefix != "held_out" or not parts:
        return f"{metric!r} is not a held-out metric, such as held_out/loss"
    base, *of = parts
    if base not in BEST:
        return f"{metric!r} given, which has no best value; take {_known()}"
    # Only the loss exists without a kind, and split by the losses of a sum: held_out/loss/KIND/LOSS.
    is_whole = base == "loss" and (not of or (len(of) == 2 and of[1] in LOSSES))
    if (of and of[0] not in KINDS) or not (is_whole or len(of) == 1) or (base in _OF_PAIRS and of[0] != "pair"):
        return f"{metric!r} given, which is never measured; take {_known()}"
    return None


def badness(metric: str, value: float) -> float:
    """A number that orders the values of a metric: the smaller, the better."""
    best = "highest" if is_of_task(metric) else BEST[metric.split("/")[1]]
    return value if best == "lowest" else -value if best == "highest" else abs(value)


def _known() -> str:
    names = ", ".join(name for name in BEST if name != "loss")
    return f"held_out/loss, held_out/loss/KIND, or held_out/NAME/KIND; NAME: {names}; KIND: {', '.join(KINDS)}"
