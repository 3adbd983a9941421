"""Is a run healthy? The table of docs/objectives.md, applied to the metrics of a run.

`RULES` is that table: the document shows it word for word, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

from uft_ds.data.example import KINDS

Lines = Seq[dict[str, Any]]
Answer = Literal["yes", "no", "unclear"]

HELD_OUT = "held_out/"
_TENTH = 0.1
"""Share of the steps, at the start and at the end, over which a training metric is averaged."""
_FALL = 0.01
"""A loss falls if it ends at least this share below its start."""
_RISE_AGAIN = 0.05
"""A held-out loss rises again if it ends more than this share above its lowest value."""
_WELL_CALIBRATED = 0.1
_MOST_STUCK = 0.05
_LENGTH_BIAS = 0.3


@dataclass(frozen=True)
class Course:
    """One metric over the run.

    first, last: the first and the last evaluation; of a training metric, means over the first and last tenth of the
        steps.
        NaN: the last evaluation, or the loss of the last tenth of the steps, is no number.
    lowest: the lowest value of an evaluation, or of the two means.
    responses: number of responses that `last` was computed over; 0 if that is not known.
    """

    first: float
    last: float
    lowest: float
    responses: int


@dataclass(frozen=True)
class Verdict:
    """One line: the metric, what was measured, whether it is healthy, and what to do if it is not.

    healthy: unclear, if chance alone would give such a value with so few responses.
    remedy: empty if it is healthy.
    """

    metric: str
    measured: str
    healthy: Answer
    remedy: str


@dataclass(frozen=True)
class Rule:
    """A row of the table, in Markdown. `judge` gets the courses of `metrics` in their order.

    metrics: names without `held_out/`; KIND stands for each kind of response.
    """

    look_at: str
    healthy: str
    if_not: str
    metrics: tuple[str, ...]
    judge: Callable[..., Answer]


def _answer(is_healthy: bool) -> Answer:
    return "yes" if is_healthy else "no"


def _beyond_chance(value: float, of_chance: float) -> Answer:
    """Whether a value is above 0; unclear, if it is within what chance gives in 19 of 20 cases."""
    return "unclear" if abs(value) < of_chance else _answer(value > 0)


def _loss(loss: Course) -> Answer:
    falls = loss.first - loss.last >= _FALL * abs(loss.first)
    return _answer(falls and loss.last - loss.lowest <= _RISE_AGAIN * abs(loss.lowest))


def _order(correlation: Course) -> Answer:
    # Without any order, Spearman's correlation of n responses has the standard deviation 1 / sqrt(n - 1).
    return _beyond_chance(correlation.last, 2 / math.sqrt(max(1, correlation.responses - 1)))


def _calibration(error: Course) -> Answer:
    """Of graded responses alone: labels and pairs are 0 or 1, so where half are 1 the untrained model has no error."""
    return _answer(error.last <= max(_WELL_CALIBRATED, error.first - 1e-9))


def _stuck(share: Course) -> Answer:
    return _answer(share.last <= _MOST_STUCK)


def _pairs(accuracy: Course, margin: Course) -> Answer:
    pairs = max(1, accuracy.responses // 2)
    order = _beyond_chance(accuracy.last - 0.5, 1 / math.sqrt(pairs))
    return "no" if margin.last <= margin.first else order


def _chosen(chosen: Course, margin: Course) -> Answer:
    return _answer(chosen.last >= chosen.first or margin.last <= margin.first)


def _length(correlation: Course) -> Answer:
    if abs(correlation.last) <= _LENGTH_BIAS:
        return "yes"
    return "unclear" if abs(correlation.last) < 2 / math.sqrt(max(1, correlation.responses - 1)) else "no"


RULES = (
    Rule(
        "`held_out/loss`",
        "falls by 1% or more, and ends within 5% of its lowest value",
        "it does not fall: more steps, a higher `train.lr`, or a larger beta; it rises again: fewer epochs, a lower "
        "`train.lr`, or the checkpoint of `train.keep_best: held_out/loss`",
        ("loss",),
        _loss,
    ),
    Rule(
        "`held_out/rank_correlation/KIND`",
        "above 0: better responses get higher rewards",
        "the scores hold nothing that the model can learn, or beta x lr is too small",
        ("rank_correlation/KIND",),
        _order,
    ),
    Rule(
        "`held_out/calibration_error/score`, the reliability picture",
        "falls or is at most 0.1, points near the diagonal",
        "all points below it: rewards too high for the scores; a shift, or `score_map`; a steeper line than it: "
        "rewards too small; more steps, a higher `train.lr`, or a larger beta",
        ("calibration_error/score",),
        _calibration,
    ),
    Rule(
        "`saturated_stuck/KIND` (of kinds under `mse` or `l1`)",
        "at most 0.05",
        "beta or lr too large: those have no gradient where sigma(r) is wrong and certain; `bce` has",
        ("saturated_stuck/KIND",),
        _stuck,
    ),
    Rule(
        "`pair_accuracy`, `pair_margin`, in the reward that the pair loss itself compares",
        "accuracy above 0.5, the margin rises",
        "the pairs hold nothing that the model can learn, or beta x lr is too small; look at some pairs by "
        "`uft data preview`",
        ("pair_accuracy/pair", "pair_margin/pair"),
        _pairs,
    ),
    Rule(
        "`implicit_reward_chosen`",
        "does not fall while the margin rises",
        "good answers become less likely to raise the margin: add `nll`, take `dpop`, or a pointwise loss",
        ("implicit_reward_chosen/pair", "pair_margin/pair"),
        _chosen,
    ),
    Rule(
        "`length_correlation/KIND`, the log-ratio over length",
        "between -0.3 and 0.3",
        "above it: longer responses reach a score with less change a token: `length_normalized`; below it: long "
        "responses are learned less than short ones: look at some in `held_out.csv`",
        ("length_correlation/KIND",),
        _length,
    ),
)


def verdicts(lines: Lines) -> list[Verdict]:
    """Apply the table to a run's metrics. Rows whose metrics the run does not have are left out.

    Held-out metrics are judged where there are any, otherwise those of the training steps, which a run of the same
    quality may pass by learning its data by heart.

    Args:
        lines: of metrics.jsonl.
    """
    prefix = HELD_OUT if any(f"{HELD_OUT}loss" in line for line in lines) else ""
    return [verdict for rule in RULES for verdict in _of_rule(rule, lines, prefix)]


def headline(found: Seq[Verdict]) -> str:
    """`4 of 6 healthy, 1 unclear`."""
    counts = {answer: sum(verdict.healthy == answer for verdict in found) for answer in ("yes", "unclear")}
    unclear = f", {counts['unclear']} unclear" if counts["unclear"] else ""
    return f"{counts['yes']} of {len(found)} healthy{unclear}"


def in_words(found: Seq[Verdict]) -> list[str]:
    """Lines for a terminal: how much is healthy, and each metric that is not, with its remedy; none without metrics."""
    if not found:
        return []
    wrong = [verdict for verdict in found if verdict.healthy == "no"]
    lines = [f"{verdict.metric}: {verdict.measured}: {verdict.remedy.replace('`', '')}" for verdict in wrong]
    return [f"verdict: {headline(found)}", *(f"not healthy: {line}" for line in lines)]


def _of_rule(rule: Rule, lines: Lines, prefix: str) -> Iterator[Verdict]:
    by_kind = any("KIND" in name for name in rule.metrics)
    for kind in KINDS if by_kind else ("",):
        names = [name.replace("KIND", kind) for name in rule.metrics]
        found = [course(lines, name, prefix) for name in names]
        courses = [one for one in found if one is not None]
        if len(courses) < len(names):
            continue
        is_undefined = any(math.isnan(one.last) for one in courses)
        healthy = "no" if is_undefined else rule.judge(*courses)
        measured = "; ".join(
            f"{name} {_number(one)}" if len(names) > 1 else _number(one)
            for name, one in zip(names, courses, strict=True)
        )
        remedy = {"yes": "", "no": rule.if_not, "unclear": _too_few(courses[0])}[healthy]
        if is_undefined:
            remedy = _UNDEFINED
        yield Verdict(prefix + names[0], measured, healthy, remedy)


_UNDEFINED = (
    "no number at the end: log-probs that are not finite (a lower `train.lr`, an earlier checkpoint), or rewards that "
    "are all the same"
)


def _too_few(one: Course) -> str:
    return f"chance alone gives such a value with {one.responses:,} responses: hold out more"


def _number(one: Course) -> str:
    first, last = ("undefined" if math.isnan(value) else f"{value:.3g}" for value in (one.first, one.last))
    return f"{last} (at the start {first})"


def course(lines: Lines, name: str, prefix: str) -> Course | None:
    """A metric over the run; None if no line has a value of it, except for the loss, which is defined for any data."""
    present = [line for line in lines if prefix + name in line]
    having = [line for line in present if line[prefix + name] is not None]
    if not having:
        return Course(math.nan, math.nan, math.nan, 0) if present and name == "loss" else None
    kind = name.rpartition("/")[2]
    count = f"{prefix}responses/{kind}"
    values = [float(line[prefix + name]) for line in having]
    if prefix:
        last = values[-1] if having[-1] is present[-1] else math.nan
        return Course(values[0], last, min(values), int(having[-1].get(count) or 0))
    few = max(1, round(_TENTH * len(values)))
    first, last = sum(values[:few]) / few, sum(values[-few:]) / few
    if name == "loss" and all(line["loss"] is None for line in present[-few:]):
        last = math.nan
    responses = sum(int(line.get(count) or 0) for line in having[-few:])
    return Course(first, last, min(first, last), responses)
