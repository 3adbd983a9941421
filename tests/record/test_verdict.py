"""A run is judged by the table that docs/objectives.md shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uft_ds.data.example import KINDS
from uft_ds.record.telemetry import ROW
from uft_ds.record.verdict import RULES, in_words, verdicts

ROOT = Path(__file__).parents[2]


def held_out(*steps: dict[str, float | None]) -> list[dict[str, Any]]:
    """Evaluations, each with a loss that falls."""
    return [
        {"step": number, "held_out/loss": 0.25 / (1 + number)} | {f"held_out/{name}": v for name, v in values.items()}
        for number, values in enumerate(steps)
    ]


def of_metric(lines: list[dict[str, Any]], metric: str) -> str | None:
    """Whether one metric is healthy; None if it is not judged."""
    return next((verdict.healthy for verdict in verdicts(lines) if verdict.metric == metric), None)


def test_the_document_shows_the_table() -> None:
    """Row by row and word for word; and nothing is judged by a metric that docs/metrics.md does not describe."""
    document = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    section = document.partition("## Is the run healthy?")[2]
    rows = [
        tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in re.findall(r"^\|.*$", section, re.MULTILINE)
    ]
    assert rows[2:] == [(rule.look_at, rule.healthy, rule.if_not) for rule in RULES]
    described = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for rule in RULES:
        general = [name.replace("/score", "/KIND") for name in rule.metrics]
        assert all(name in described or "implicit_reward_chosen" in name for name in general)
        assert all(name.partition("/")[0] in rule.look_at for name in rule.metrics[:1])


@pytest.mark.parametrize(
    ("metric", "values", "healthy"),
    [
        ("rank_correlation/score", [None, 0.5], "yes"),
        ("rank_correlation/score", [None, 0.1], "unclear"),  # of 101 responses, chance gives up to 0.2
        ("rank_correlation/score", [None, -0.5], "no"),
        ("rank_correlation/score", [None, None], None),
        ("calibration_error/score", [0.3, 0.2], "yes"),
        ("calibration_error/score", [0.0, 0.08], "yes"),  # scores of mean 1/2 begin at 0
        ("calibration_error/score", [0.05, 0.12], "unclear"),  # chance gives up to 0.16
        ("calibration_error/score", [0.1, 0.2], "no"),
        ("saturated_stuck/score", [0.0, 0.05], "yes"),
        ("saturated_stuck/score", [0.0, 0.2], "no"),
        ("length_correlation/score", [None, -0.3], "yes"),
        ("length_correlation/score", [None, -0.5], "no"),
        ("length_correlation/instruction", [None, -0.5], None),
    ],
)
def test_each_kind_is_judged_by_its_last_value(metric: str, values: list[float | None], healthy: str | None) -> None:
    """Values of the first and the last evaluation of 101 responses; null is no value."""
    lines = held_out(*({metric: value, "responses/score": 101.0} for value in values))
    assert of_metric(lines, f"held_out/{metric}") == healthy


def test_pairs_are_not_judged_by_calibration() -> None:
    """Half of their scores are 1: untrained the error is 0, and it rises as soon as the order is learned."""
    lines = held_out(*({"calibration_error/pair": error, "responses/pair": 100.0} for error in (0.0, 0.49)))
    assert of_metric(lines, "held_out/calibration_error/pair") is None


@pytest.mark.parametrize("name", ["loss", "calibration_error/score", "rank_correlation/score"])
def test_what_is_no_number_at_the_end_is_not_healthy(name: str) -> None:
    """A run that diverged before its last evaluation is not judged by the evaluation before that."""
    lines: list[dict[str, Any]] = [
        {"step": step, "held_out/loss": loss, "held_out/responses/score": 101.0, f"held_out/{name}": value}
        for step, (loss, value) in enumerate([(0.25, 0.25), (0.2, 0.2), (0.15, 0.15), (None, None)])
    ]
    found = {verdict.metric: verdict for verdict in verdicts(lines)}[f"held_out/{name}"]
    assert (found.healthy, found.measured) == ("no", "undefined (at the start 0.25)")
    assert found.remedy.startswith("no number at the end: log-probs that are not finite")
    assert any(line.startswith(f"not healthy: held_out/{name}: undefined") for line in in_words(verdicts(lines)))


@pytest.mark.parametrize(
    ("losses", "healthy"),
    [([0.25] * 10 + [0.2] * 9 + [None], "yes"), ([0.25] * 10 + [0.2] * 8 + [None] * 2, "no"), ([None] * 3, "no")],
    ids=["one skipped step", "skipped to the end", "never a number"],
)
def test_a_training_loss_that_ends_undefined_is_not_healthy(losses: list[float | None], healthy: str) -> None:
    """Without held-out data: where the last tenth of the steps has no finite loss."""
    assert of_metric([{"step": step, "loss": loss} for step, loss in enumerate(losses)], "loss") == healthy


@pytest.mark.parametrize(
    ("losses", "healthy"),
    [
        ([0.25, 0.2], "yes"),
        ([0.25, 0.2499], "no"),
        ([0.25, 0.1, 0.2], "no"),
        ([0.25, 0.2, 0.205], "yes"),
        ([0.2], "no"),
    ],
    ids=["falls", "hardly", "rises again", "rises within 5%", "one evaluation"],
)
def test_a_held_out_loss_falls_and_stays(losses: list[float], healthy: str) -> None:
    """By 1% at least, and not back by more than 5% of the lowest."""
    lines = [{"step": step, "held_out/loss": loss} for step, loss in enumerate(losses)]
    assert of_metric(lines, "held_out/loss") == healthy


def pairs(accuracy: float, margin: float, chosen: float, count: int = 200) -> list[dict[str, Any]]:
    last = {"pair_accuracy/pair": accuracy, "pair_margin/pair": margin, "implicit_reward_chosen/pair": chosen}
    start = {"pair_accuracy/pair": 0.5, "pair_margin/pair": 0.0, "implicit_reward_chosen/pair": 0.0}
    return held_out(*({**values, "responses/pair": 2.0 * count} for values in (start, last)))


def test_pairs_are_judged_by_order_and_by_the_chosen_side() -> None:
    """Of 200 pairs chance gives an accuracy of 0.43 to 0.57; a margin that the chosen side pays for is not healthy."""
    accuracy, chosen = "held_out/pair_accuracy/pair", "held_out/implicit_reward_chosen/pair"
    assert of_metric(pairs(0.7, 0.2, 0.1), accuracy) == "yes"
    assert of_metric(pairs(0.55, 0.2, 0.1), accuracy) == "unclear"
    assert of_metric(pairs(0.7, -0.1, 0.1), accuracy) == "no"
    assert of_metric(pairs(0.7, 0.2, 0.1), chosen) == "yes"
    assert of_metric(pairs(0.7, 0.2, -0.1), chosen) == "no"
    assert of_metric(pairs(0.4, -0.2, -0.1), chosen) == "yes", "without a margin nothing was paid for"


def test_without_held_out_data_the_steps_are_judged() -> None:
    """Means over the first and the last tenth: one step of a few responses says little."""
    lines = [
        {"step": n, "loss": 0.2, "saturated_stuck/score": 0.5 * (n == 3), "responses/score": 8.0} for n in range(40)
    ]
    lines[-1]["saturated_stuck/score"] = 0.16
    (loss, stuck) = verdicts(lines)
    assert (loss.metric, loss.healthy) == ("loss", "no")
    assert (stuck.metric, stuck.measured, stuck.healthy) == (
        "saturated_stuck/score",
        "0.04 (at the start 0.125)",
        "yes",
    )


def test_a_policy_gradient_is_not_judged_by_its_loss() -> None:
    """Its value may rise while the policy improves, and it fits no implicit score; other losses and orders count."""
    metrics = {"calibration_error/score": 0.4, "responses/score": 800.0, "rank_correlation/score": 0.5}
    steps = [{"step": n, "loss": 0.1 + n, "advantage/score": 0.2, **metrics} for n in range(9)]
    assert [found.metric for found in verdicts(steps)] == ["rank_correlation/score"]
    evaluated = [{"step": 9, "held_out/loss": 0.2, **{f"held_out/{name}": v for name, v in metrics.items()}}]
    judged = ["held_out/loss", "held_out/rank_correlation/score"]
    assert [found.metric for found in verdicts([*steps, *evaluated])] == judged
    centered = [step | {"centered/score": 1.0} for step in steps]
    assert [found.metric for found in verdicts(centered)] == [
        "loss", "rank_correlation/score", "calibration_error/score",
    ]  # fmt: skip


def test_held_out_data_without_a_loss_is_judged() -> None:
    """Scored answers of data beside rloo have none; the training steps do not take their place."""
    lines = [{"step": 1, "loss": 0.2, "rank_correlation/score": -0.9, "responses/score": 800.0}]
    lines.append({"step": 1, "held_out/rank_correlation/score": 0.5, "held_out/responses/score": 800.0})
    assert [(found.metric, found.healthy) for found in verdicts(lines)] == [("held_out/rank_correlation/score", "yes")]


def test_a_remedy_is_given_where_one_is_needed() -> None:
    """The table's words where a metric is not healthy, and how to know more where chance may be at work."""
    lines = held_out({}, {"rank_correlation/score": 0.2, "responses/score": 12.0, "saturated_stuck/score": 0.2})
    said = {verdict.metric: verdict.remedy for verdict in verdicts(lines)}
    assert said["held_out/loss"] == ""
    assert said["held_out/saturated_stuck/score"] == RULES[3].if_not
    assert "with 12 responses: hold out more" in said["held_out/rank_correlation/score"]


def test_the_terminal_tells_what_is_not_healthy() -> None:
    """How much is, and of what is not the value and the remedy, without Markdown; what is unclear is only counted."""
    lines = held_out({}, {"rank_correlation/score": 0.2, "responses/score": 12.0, "saturated_stuck/score": 0.2})
    assert in_words(verdicts(lines)) == [
        "verdict: 1 of 3 healthy, 1 unclear",
        f"not healthy: held_out/saturated_stuck/score: 0.2 (at the start 0.2): {RULES[3].if_not.replace('`', '')}",
    ]
    assert in_words([]) == []


def test_a_first_value_after_the_start_is_named_by_its_step() -> None:
    """Before the first step no log-ratio differs from another, so there is no correlation: the first is of step 2."""
    lines = held_out(
        *({"rank_correlation/score": value, "responses/score": 101.0} for value in (None, None, -0.2, 0.5))
    )
    measured = {verdict.metric: verdict.measured for verdict in verdicts(lines)}
    assert measured["held_out/rank_correlation/score"] == "0.5 (first, step 2: -0.2)"
    assert measured["held_out/loss"] == "0.0625 (at the start 0.25)"
    of_steps = [{"step": 1, "loss": 0.25, "rank_correlation/score": None}]
    of_steps += [{"step": step, "loss": 0.25, "rank_correlation/score": 0.5} for step in (2, 3)]
    assert [verdict.measured for verdict in verdicts(of_steps)][1] == "0.5 (first, step 2: 0.5)"


@pytest.mark.parametrize(("correlation", "side"), [(0.5, "above 0.3: "), (-0.5, "below -0.3: ")])
def test_a_length_bias_is_told_by_its_side(correlation: float, side: str) -> None:
    """Only the remedy of the side that the value is on."""
    lines = held_out({}, {"length_correlation/score": correlation, "responses/score": 101.0})
    (_, length) = verdicts(lines)
    assert length.remedy == side + RULES[-1].remedies[side.removesuffix(": ")]


@pytest.mark.parametrize(
    ("losses", "cases"),
    [
        ([0.25, 0.2499], ["it does not fall"]),
        ([0.25, 0.1, 0.2], ["it rises again"]),
        ([0.25, 0.1, 0.25], ["it does not fall", "it rises again"]),
    ],
)
def test_a_loss_is_told_by_what_it_does(losses: list[float], cases: list[str]) -> None:
    """Both remedies only where both apply."""
    (loss,) = verdicts([{"step": step, "held_out/loss": loss} for step, loss in enumerate(losses)])
    assert loss.remedy == "; ".join(f"{case}: {RULES[0].remedies[case]}" for case in cases)


@pytest.mark.parametrize(
    ("implicit", "given", "case"),
    [
        ([0.7, 0.8], [0.2, 0.5], "points below the diagonal"),
        ([0.2, 0.5], [0.7, 0.8], "points above the diagonal"),
        ([0.4, 0.6], [0.1, 0.9], "a steeper line"),
        ([0.1, 0.9], [0.4, 0.6], "a flatter line"),
    ],
)
def test_calibration_is_told_by_where_its_points_are(implicit: list[float], given: list[float], case: str) -> None:
    """Responses of the kind alone; without the rows of held_out.csv all cases are told."""
    rows = np.zeros(4, dtype=ROW)
    rows["kind"] = [KINDS.index("score")] * 2 + [KINDS.index("binary")] * 2
    rows["implicit_score"], rows["score"] = [*implicit, 0.0, 1.0], [*given, 1.0, 0.0]
    error = float(np.abs(np.subtract(implicit, given)).mean())
    lines = held_out({"calibration_error/score": 0.1}, {"calibration_error/score": error, "responses/score": 200.0})
    (_, calibration) = verdicts(lines, rows)
    assert calibration.remedy == f"{case}: {RULES[2].remedies[case]}"
    (_, unknown) = verdicts(lines)
    assert unknown.remedy == RULES[2].if_not


def test_a_run_without_metrics_has_no_verdict() -> None:
    """Nor is a metric judged that the data never defines, such as the order of responses with one score."""
    assert verdicts([]) == []
    assert verdicts([{"step": 1, "rank_correlation/score": None}]) == []
