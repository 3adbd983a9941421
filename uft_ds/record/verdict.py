"""Is a run healthy? The table of docs/objectives.md, applied to the metrics of a run.

`RULES` is that table: the document shows it word for word, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from uft_ds.data.example import KINDS, Kind
from uft_ds.record.telemetry import targets

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

Rows = np.ndarray | None
"""The held-out responses of a kind at the newest evaluation, as `telemetry.read_rows` reads them; None: not known."""


@dataclass(frozen=True)
class Course:
    """One metric over the run.

    first, last: the first and the last evaluation with a value; of a training metric, means over the first and last
        tenth of the steps.
        NaN: the last evaluation, or the loss of the last tenth of the steps, is no number.
    first_step: where `first` begins, if there were evaluations or steps without a value before it; None: at the start.
    lowest: the lowest value of an evaluation, or of the two means.
    responses: number of responses that `last` was computed over; 0 if that is not known.
    """

    first: float
    last: float
    lowest: float
    responses: int
    first_step: int | None = None


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

    remedies: what to do if it is not healthy, by what is wrong; under "" if only one thing can be.
    metrics: names without `held_out/`; KIND stands for each of `kinds`.
    wrong: given the same courses and the held-out responses of the kind, what of `remedies` is wrong; empty if that is
        not known.
    """

    look_at: str
    healthy: str
    remedies: Mapping[str, str]
    metrics: tuple[str, ...]
    judge: Callable[..., Answer]
    kinds: tuple[Kind, ...] = KINDS
    wrong: Callable[[Seq[Course], Rows], Seq[str]] = lambda courses, rows: ()

    @property
    def if_not(self) -> str:
        """All remedies, as the table shows them."""
        return self._of(self.remedies)

    def remedy(self, courses: Seq[Course], rows: Rows) -> str:
        """The remedies for what is wrong; all of them if that is not known."""
        return self._of(self.wrong(courses, rows) or self.remedies)

    def _of(self, cases: Iterable[str]) -> str:
        return "; ".join(f"{case}: {self.remedies[case]}" if case else self.remedies[case] for case in cases)


def _answer(is_healthy: bool) -> Answer:
    return "yes" if is_healthy else "no"


def _beyond_chance(value: float, of_chance: float) -> Answer:
    """Whether a value is above 0; unclear, if it is within what chance gives in 19 of 20 cases."""
    return "unclear" if abs(value) < of_chance else _answer(value > 0)


_NO_FALL, _RISES = "it does not fall", "it rises again"


def _wrong_with_loss(courses: Seq[Course], rows: Rows) -> list[str]:
    (loss,) = courses
    wrong = [] if loss.first - loss.last >= _FALL * abs(loss.first) else [_NO_FALL]
    return wrong if loss.last - loss.lowest <= _RISE_AGAIN * abs(loss.lowest) else [*wrong, _RISES]


def _loss(loss: Course) -> Answer:
    return _answer(not _wrong_with_loss([loss], None))


def _order(correlation: Course) -> Answer:
    # Without any order, Spearman's correlation of n responses has the standard deviation 1 / sqrt(n - 1).
    return _beyond_chance(correlation.last, 2 / math.sqrt(max(1, correlation.responses - 1)))


def _calibration(error: Course) -> Answer:
    """Of graded responses alone: labels and pairs are 0 or 1, so where half are 1 the untrained model has no error."""
    if error.last <= max(_WELL_CALIBRATED, error.first - 1e-9):
        return "yes"
    # The n / 10 scores of a bin, of standard deviation at most 1/2, have a mean that is off by 1 / (2 sqrt(n / 10)).
    return "unclear" if error.last < 0.5 * math.sqrt(10 / max(1, error.responses)) else "no"


_TOO_HIGH, _TOO_LOW, _STEEPER, _FLATTER = (
    "points below the diagonal", "points above the diagonal", "a steeper line", "a flatter line"
)  # fmt: skip


def _wrong_with_calibration(courses: Seq[Course], rows: Rows) -> list[str]:
    """Where the points of the reliability picture lie: on one side of the diagonal, or on a line that crosses it."""
    (error,) = courses
    if rows is None or not len(rows) or not np.isfinite(rows["implicit_score"]).all():
        return []
    implicit, given = rows["implicit_score"], targets(rows)
    too_high = float((implicit - given).mean())
    if abs(too_high) >= error.last / 2:
        return [_TOO_HIGH if too_high > 0 else _TOO_LOW]
    return [_STEEPER if np.cov(implicit, given - implicit)[0, 1] > 0 else _FLATTER]


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


_NOT_OF_ONE_SCORE: tuple[Kind, ...] = ("score", "binary", "pair")
"""Instruction data has one score: all its log-ratios should rise, and how far one can rise is what the reference does
not know of the response, -log pi_ref, which depends on length for reasons that are no bias."""
_ABOVE, _BELOW = "above 0.3", "below -0.3"


def _wrong_with_length(courses: Seq[Course], rows: Rows) -> list[str]:
    return [_ABOVE if courses[0].last > 0 else _BELOW]


RULES = (
    Rule(
        "`held_out/loss`",
        "falls by 1% or more, and ends within 5% of its lowest value",
        {
            _NO_FALL: "more steps, a higher `train.lr`, or a larger beta",
            _RISES: "fewer epochs, a lower `train.lr`, or the checkpoint of `train.keep_best: held_out/loss`",
        },
        ("loss",),
        _loss,
        wrong=_wrong_with_loss,
    ),
    Rule(
        "`held_out/rank_correlation/KIND`",
        "above 0: better responses get higher rewards",
        {"": "the scores hold nothing that the model can learn, or beta x lr is too small"},
        ("rank_correlation/KIND",),
        _order,
    ),
    Rule(
        "`held_out/calibration_error/score`, the reliability picture",
        "falls or is at most 0.1, points near the diagonal",
        {
            _TOO_HIGH: "rewards too high for the scores: a shift, or `score_map`",
            _TOO_LOW: "rewards too low for the scores: more steps, a higher `train.lr`, or a shift below 0",
            _STEEPER: "rewards too small: more steps, a higher `train.lr`, or a larger beta",
            _FLATTER: "rewards too large: fewer epochs, a lower `train.lr`, or a smaller beta",
        },
        ("calibration_error/score",),
        _calibration,
        wrong=_wrong_with_calibration,
    ),
    Rule(
        "`saturated_stuck/KIND` (of kinds under `mse` or `l1`)",
        "at most 0.05",
        {"": "beta or lr too large: those have no gradient where sigma(r) is wrong and certain; `bce` has"},
        ("saturated_stuck/KIND",),
        _stuck,
    ),
    Rule(
        "`pair_accuracy`, `pair_margin`, in the reward that the pair loss itself compares",
        "accuracy above 0.5, the margin rises",
        {
            "": "the pairs hold nothing that the model can learn, or beta x lr is too small; look at some pairs by "
            "`uft data preview`"
        },
        ("pair_accuracy/pair", "pair_margin/pair"),
        _pairs,
    ),
    Rule(
        "`implicit_reward_chosen`",
        "does not fall while the margin rises",
        {"": "good answers become less likely to raise the margin: add `nll`, take `dpop`, or a pointwise loss"},
        ("implicit_reward_chosen/pair", "pair_margin/pair"),
        _chosen,
    ),
    Rule(
        "`length_correlation/KIND` (not of instruction data), the log-ratio, or a reward model's reward, over length",
        "between -0.3 and 0.3",
        {
            _ABOVE: "longer responses reach a score with less change a token: `length_normalized` (a reward model "
            "prefers length: add pairs whose shorter answer is better)",
            _BELOW: "long responses are learned less than short ones: look at some in `held_out.csv`",
        },
        ("length_correlation/KIND",),
        _length,
        kinds=_NOT_OF_ONE_SCORE,
        wrong=_wrong_with_length,
    ),
)


def verdicts(lines: Lines, rows: Rows = None) -> list[Verdict]:
    """Apply the table to a run's metrics. Rows whose metrics the run does not have are left out.

    Held-out metrics are judged where there are any, otherwise those of the training steps, which a run of the same
    quality may pass by learning its data by heart.

    Args:
        lines: of metrics.jsonl.
        rows: of held_out.csv, as `read_rows` reads it; without them some remedies name what either side needs.
    """
    prefix = HELD_OUT if has_held_out(lines) else ""
    unjudged = _UNJUDGED_OF_ADVANTAGES if _trains_on_advantages(lines) else frozenset()
    found = [verdict for rule in RULES for verdict in _of_rule(rule, lines, prefix, rows)]
    return [verdict for verdict in found if verdict.metric not in unjudged]


def has_held_out(lines: Lines) -> bool:
    """Whether the run was evaluated on held-out data, of which no response may have a loss."""
    return any(name.startswith(HELD_OUT) for line in lines for name in line)


_UNJUDGED_OF_ADVANTAGES = frozenset({"loss", "calibration_error/score", f"{HELD_OUT}calibration_error/score"})
"""Metrics that say nothing of a policy gradient loss: its value is no distance, and it fits no implicit score."""


def _trains_on_advantages(lines: Lines) -> bool:
    """Whether responses of kind score have a policy gradient loss; centred ones have advantages, too."""
    return any("advantage/score" in line and "centered/score" not in line for line in lines)


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


def _of_rule(rule: Rule, lines: Lines, prefix: str, rows: Rows) -> Iterator[Verdict]:
    by_kind = any("KIND" in name for name in rule.metrics)
    for kind in rule.kinds if by_kind else ("",):
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
        remedy = {"yes": "", "no": _UNDEFINED, "unclear": _too_few(courses[0])}[healthy]
        if healthy == "no" and not is_undefined:
            remedy = rule.remedy(courses, _of_metric(rows, names[0]))
        yield Verdict(prefix + names[0], measured, healthy, remedy)


_UNDEFINED = (
    "no number at the end: log-probs that are not finite (a lower `train.lr`, an earlier checkpoint), or rewards that "
    "are all the same"
)


def _too_few(one: Course) -> str:
    return f"chance alone gives such a value with {one.responses:,} responses: hold out more"


def _number(one: Course) -> str:
    first, last = ("undefined" if math.isnan(value) else f"{value:.3g}" for value in (one.first, one.last))
    when = "at the start" if one.first_step is None else f"first, step {one.first_step}:"
    return f"{last} ({when} {first})"


def _of_metric(rows: Rows, name: str) -> Rows:
    """The responses of the kind that a metric is of."""
    kind = name.rpartition("/")[2]
    return rows[rows["kind"] == KINDS.index(kind)] if rows is not None and kind in KINDS else None


def course(lines: Lines, name: str, prefix: str) -> Course | None:
    """A metric over the run; None if no line has a value of it, except for the loss, which is defined for any data."""
    present = [line for line in lines if prefix + name in line]
    having = [line for line in present if line[prefix + name] is not None]
    if not having:
        return Course(math.nan, math.nan, math.nan, 0) if present and name == "loss" else None
    kind = name.rpartition("/")[2]
    count = f"{prefix}responses/{kind}"
    values = [float(line[prefix + name]) for line in having]
    first_step = None if having[0] is present[0] else int(having[0]["step"])
    if prefix:
        last = values[-1] if having[-1] is present[-1] else math.nan
        return Course(values[0], last, min(values), int(having[-1].get(count) or 0), first_step)
    few = max(1, round(_TENTH * len(values)))
    first, last = sum(values[:few]) / few, sum(values[-few:]) / few
    if name == "loss" and all(line["loss"] is None for line in present[-few:]):
        last = math.nan
    responses = sum(int(line.get(count) or 0) for line in having[-few:])
    return Course(first, last, min(first, last), responses, first_step)
