"""Whether a run is healthy: every number by hand from a few rows, and the step's metrics by their names."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import UFT, objective

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.objectives.baselines import Baselines
from uft_ds.objectives.objective import KindObjective, Objective, micro_batch_loss
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.objectives.pointwise import pointwise_loss
from uft_ds.record.telemetry import (
    ROW,
    calibration,
    calibration_error,
    health,
    implicit_scores,
    pair_rewards,
    rank_correlation,
    read_rows,
    response_rows,
    sides,
    write_rows,
)

NAN = float("nan")
OF_THE_REFERENCE = {
    "implicit_reward", "implicit_score", "log_ratio", "log_ratio_per_token", "saturated", "saturated_fitted",
    "saturated_stuck", "score_error", "calibration_error", "rank_correlation", "length_correlation",
}  # fmt: skip
OF_PAIRS = {
    "logp_chosen", "logp_rejected", "pair_margin", "pair_accuracy", "implicit_reward_chosen",
    "implicit_reward_rejected",
}  # fmt: skip


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def said(policy_R: Tensor, reference_R: Tensor | None = None) -> dict[str, Tensor]:
    return {"policy": policy_R} if reference_R is None else {"policy": policy_R, "reference": reference_R}


def row(kind: Kind, score: float, reward: float, **values: Any) -> tuple[Any, ...]:
    """One response, of 4 tokens at beta 0.1 unless `values` say otherwise."""
    named = {"pair": -1, "tokens": 4, "logp": -10.0, "log_ratio": reward / 0.1, "shift": 0.0}
    named |= {"entropy": 6.0, "top1": 3.0, "rounding": 0.0, "score_shift": 0.0, "advantage": NAN} | values
    named = {"implicit_score": sigmoid(reward - named["shift"]), "pair_reward": reward} | named
    named |= {"kind": KINDS.index(kind), "score": score, "reward": reward}
    assert ROW.names is not None
    assert set(named) == set(ROW.names)
    return tuple(named[name] for name in ROW.names)


def table(*rows: tuple[Any, ...]) -> np.ndarray:
    return np.array(list(rows), dtype=ROW)


# ---- the table


def batch_of_three() -> MicroBatch:
    """A scored response of 2 tokens, and a pair of 3 and 1."""
    talk = Sequence(np.arange(9, dtype=np.int32), (Response(4, 6, 0.25, "score", "a"),))
    chosen = Sequence(np.arange(9, dtype=np.int32), (Response(1, 4, 0.9, "pair", "b", pair_id=5),))
    rejected = Sequence(np.arange(9, dtype=np.int32), (Response(1, 2, 0.1, "pair", "c", pair_id=5),))
    return micro_batch([talk, chosen, rejected])


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_a_row_a_response() -> None:
    """Kind, pair, score, tokens; log-probs; log-ratio and reward at beta 0.1; the shift apart."""
    batch = batch_of_three()
    baselines = Baselines(torch.tensor([0.5, 0.5, 0.5]), batch.scores_R, values(NAN, NAN, NAN))
    rows = response_rows(objective(), batch, said(values(-3, -4, -5), values(-13, -2, -5)), baselines)
    assert rows.dtype == ROW
    assert rows["kind"].tolist() == [1, 3, 3]
    assert rows["pair"].tolist() == [-1, 5, 5]
    assert rows["score"].tolist() == [0.25, 0.9, 0.1]
    assert rows["tokens"].tolist() == [2.0, 3.0, 1.0]
    assert rows["logp"].tolist() == [-3.0, -4.0, -5.0]
    assert rows["log_ratio"].tolist() == [10.0, -2.0, 0.0]
    assert rows["reward"].tolist() == pytest.approx([1.0, -0.2, 0.0])
    assert rows["shift"].tolist() == [0.5] * 3
    assert rows["pair_reward"].tolist() == pytest.approx([NAN, -0.2, 0.0], nan_ok=True)
    assert rows["implicit_score"].tolist() == pytest.approx([sigmoid(0.5), sigmoid(-0.7), sigmoid(-0.5)])


def test_rows_of_lengths_normalised_rewards() -> None:
    """The reward is beta times the log-ratio a token, 0.1 x 10 / 2; the log-ratio stays the sum."""
    uft = objective(length_normalized=True)
    rows = response_rows(uft, batch_of_three(), said(values(-3, -4, -5), values(-13, -2, -5)), None)
    assert rows["reward"].tolist() == pytest.approx([0.5, -0.2 / 3, 0.0])
    assert rows["log_ratio"].tolist() == [10.0, -2.0, 0.0]


def test_rows_without_a_reference() -> None:
    """Nothing is known of log-ratios: NaN, and no shift; the pair's loss has a reward of its own."""
    rows = response_rows(objective("simpo"), batch_of_three(), said(values(-3, -4, -5)), None)
    assert np.isnan(rows["log_ratio"]).all()
    assert np.isnan(rows["reward"]).all()
    assert np.isnan(rows["implicit_score"]).all()
    assert rows["pair_reward"].tolist() == pytest.approx([NAN, 0.1 * -4 / 3, 0.1 * -5], nan_ok=True)
    assert rows["shift"].tolist() == [0.0] * 3
    assert rows["logp"].tolist() == [-3.0, -4.0, -5.0]


def test_no_rows_of_an_empty_micro_batch() -> None:
    """A rank with nothing left gives an empty table, which others' may be joined to; nothing is said of it."""
    nothing = Baselines(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    rows = response_rows(objective(), micro_batch([]), said(values(), values()), nothing)
    assert rows.shape == (0,)
    assert len(np.concatenate([rows, table(row("score", 0.5, 1.0))])) == 1
    assert health(rows, UFT) == {}


@pytest.mark.parametrize("reward", [-800.0, -3.0, 0.0, 0.1, 800.0])
def test_implicit_scores_by_the_formula(reward: float) -> None:
    """1 / (1 + e^-(r - shift)), without overflow."""
    rows = table(row("score", 0.5, NAN, shift=0.25))
    rows["reward"] = reward
    for loss in ("mse", "l1", "bce"):
        found = implicit_scores(objective(loss), rows)
        assert found.tolist() == pytest.approx([sigmoid(reward - 0.25) if abs(reward) < 100 else float(reward > 0)])


def test_implicit_scores_under_raw() -> None:
    """r - shift + 1/2, of kinds under it alone: it is not squashed, and the loss is 0 where it is the score."""
    of = {kind: KindObjective({"mse": 1.0}, beta=0.1) for kind in KINDS}
    of |= {"score": KindObjective({"raw": 1.0, "nll": 0.5}), "binary": KindObjective({"raw": 1.0, "bce": 1.0})}
    rows = table(*(row(kind, 0.5, 2.0, shift=0.25, implicit_score=NAN) for kind in KINDS))
    found = dict(zip(KINDS, implicit_scores(Objective(of), rows).tolist(), strict=True))
    assert found.pop("score") == 2.25
    assert found == pytest.approx(dict.fromkeys(found, sigmoid(1.75)))
    rewards_R = torch.tensor([0.2, -1.0])
    fitted = torch.from_numpy(
        implicit_scores(objective("raw"), table(*(row("score", 0.5, reward) for reward in rewards_R.tolist())))
    ).float()
    assert pointwise_loss(rewards_R, fitted, "raw").tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


LOG_ODDS = {logp: logp - math.log(1 - math.exp(logp)) for logp in (-0.5, -2.0)}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"dpo": 1.0}, (0.3, -0.1)),
        ({"hinge": 1.0, "simpo": 1.0}, (0.3, -0.1)),
        ({"simpo": 1.0, "odds_ratio": 1.0, "ipo": 1.0}, (0.3, -0.1)),
        ({"simpo": 1.0, "mse": 1.0}, (0.1 * -0.5, 0.1 * -2.0)),
        ({"odds_ratio": 1.0, "contrast": 1.0}, (0.1 * -2.0, 0.1 * -4.0)),
        ({"odds_ratio": 0.1, "nll": 1.0}, (LOG_ODDS[-0.5], LOG_ODDS[-2.0])),
        ({"mse": 1.0}, (0.3, -0.1)),
        ({"nll": 1.0}, (-0.5, -2.0)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("other", ["mse", "nll"])
def test_pair_rewards_are_the_losses_own(losses: dict[str, float], expected: tuple[float, float], other: str) -> None:
    """-2 nats on 4 tokens against -4 on 2, rewards 0.3 and -0.1, beta 0.1; what other kinds' losses are plays no
    part."""
    uft = Objective(dict.fromkeys(KINDS, KindObjective({other: 1.0})) | {"pair": KindObjective(losses, beta=0.1)})
    talk = Sequence(np.arange(9, dtype=np.int32), (Response(1, 5, 1.0, "pair", "c", pair_id=0),))
    rejected = Sequence(np.arange(9, dtype=np.int32), (Response(1, 3, 0.0, "pair", "r", pair_id=0),))
    batch, logps_R = micro_batch([talk, rejected]), values(-2, -4)
    lengths_R = values(*(uft.length_of(response) for response in batch.responses))
    reference_R = logps_R - values(0.3, -0.1) * lengths_R / 0.1
    rows = response_rows(uft, batch, said(logps_R, reference_R if uft.needs_reference else None), None)
    assert rows["pair_reward"].tolist() == pytest.approx(expected)
    found = health(rows, uft)
    assert found["pair_margin/pair"] == pytest.approx(expected[0] - expected[1])
    assert (found["implicit_reward_chosen/pair"], found["implicit_reward_rejected/pair"]) == pytest.approx(expected)
    assert found["pair_accuracy/pair"] == 1.0


@pytest.mark.parametrize("loss", ["dpo", "simpo", "contrast", "odds_ratio"])
@given(numbers=st.lists(st.tuples(st.floats(-300, -0.01), st.integers(1, 50)), min_size=2, max_size=2))
@settings(max_examples=30, deadline=None)
def test_the_loss_is_a_function_of_the_pairs_margin(loss: str, numbers: list[tuple[float, int]]) -> None:
    """-log sigmoid(margin - gamma), gamma 0 but of simpo."""
    uft = objective(loss, constants=PairConstants(simpo_margin=0.25))
    sides_of = [
        Sequence(np.arange(60, dtype=np.int32), (Response(1, 1 + tokens, 0.5, "pair", "x", pair_id=0),))
        for _, tokens in numbers
    ]
    batch, logps_R = micro_batch(sides_of), values(*(logp for logp, _ in numbers))
    reference_R = values(-20.0, -30.0) if uft.needs_reference else None
    logps = {"policy": logps_R} if reference_R is None else {"policy": logps_R, "reference": reference_R}
    terms, _ = micro_batch_loss(uft, batch, {loss: 1}, logps)
    margin = health(response_rows(uft, batch, said(logps_R, reference_R), None), uft)["pair_margin/pair"]
    gamma = 0.25 if loss == "simpo" else 0.0
    assert float(terms) == pytest.approx(float(-torch.nn.functional.logsigmoid(torch.tensor(margin - gamma))), 1e-4)


def test_odds_at_probability_one_are_large_and_finite() -> None:
    """The loss has the same bound."""
    rows = table(row("pair", 1.0, 0.0, pair=0, logp=0.0), row("pair", 0.0, 0.0, pair=0, logp=-1e-9))
    found = pair_rewards(objective("odds_ratio").of_kind["pair"], rows)
    assert found.tolist() == pytest.approx([-math.log(1e-6)] * 2, rel=1e-4)


# ---- the table as CSV


MIXED_TABLE = table(
    row("instruction", 1.0, 1.2345678901234, shift=-0.5, pair_reward=NAN),
    row(
        "pair",
        0.9,
        0.25,
        pair=0,
        tokens=17,
        logp=-1234.5678901,
        log_ratio=2.5,
        implicit_score=1.75,
        pair_reward=-9.5,
        entropy=11.25,
        top1=16.0,
        score_shift=0.125,
    ),
    row("pair", 0.0, -1e-7, pair=0),
    row("binary", 0.0, NAN, log_ratio=NAN, logp=-3.0),
)


ORIGINS = ["a.jsonl:1", "b, c.jsonl:2 chosen", "b, c.jsonl:2 rejected", "d.jsonl:4"]


def test_rows_as_csv_can_be_read_by_anyone(tmp_path: Path) -> None:
    """Kinds by name, nine digits, no pair and no number as nothing; the columns are named as the metrics."""
    write_rows(tmp_path / "rows.csv", MIXED_TABLE, ORIGINS)
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "origin", "kind", "pair", "score", "implicit_score", "implicit_reward", "reward_shift", "log_ratio", "logp",
        "tokens", "pair_reward", "entropy", "top1", "rounding", "target",
    ]  # fmt: skip
    assert [line["target"] for line in lines] == ["1", "0.775", "0", "0"]
    assert [line["origin"] for line in lines] == ORIGINS
    assert [line["kind"] for line in lines] == ["instruction", "pair", "pair", "binary"]
    assert [line["pair"] for line in lines] == ["", "0", "0", ""]
    assert [line["tokens"] for line in lines] == ["4", "17", "4", "4"]
    assert lines[0]["implicit_reward"] == "1.23456789"
    assert lines[0]["implicit_score"] == f"{sigmoid(1.2345678901234 + 0.5):.9g}"
    assert lines[1]["logp"] == "-1234.56789"
    assert (lines[1]["implicit_score"], lines[1]["pair_reward"]) == ("1.75", "-9.5")
    assert lines[0]["pair_reward"] == "", "of no pair"
    assert {lines[3][name] for name in ("implicit_score", "implicit_reward", "reward_shift", "log_ratio")} == {""}
    assert lines[3]["logp"] == "-3"


def test_rows_come_back_from_csv(tmp_path: Path) -> None:
    """To nine digits, with the numbers that there were none of; the health is the same."""
    write_rows(tmp_path / "rows.csv", MIXED_TABLE, ORIGINS)
    found = read_rows(tmp_path / "rows.csv")
    assert found.dtype == ROW
    for name in ROW.names or ():
        np.testing.assert_allclose(found[name], MIXED_TABLE[name], rtol=1e-8, err_msg=name)
    assert health(found, UFT) == pytest.approx(health(MIXED_TABLE, UFT), rel=1e-7, nan_ok=True)
    write_rows(tmp_path / "empty.csv", MIXED_TABLE[:0], [])
    assert len(read_rows(tmp_path / "empty.csv")) == 0


# ---- health of responses


def test_health_by_hand() -> None:
    """Four scored responses with rewards 2, 1, 0, -1, a shift of 1, and 8, 2, 4, 2 tokens.

    Implicit scores sigmoid(1, 0, -1, -2); log-ratios 20, 10, 0, -10.
    """
    given_scores, tokens, rewards = [1.0, 0.5, 0.75, 0.0], [8, 2, 4, 2], [2.0, 1.0, 0.0, -1.0]
    rows = table(
        *(
            row("score", s, r, tokens=t, shift=1.0, logp=-t)
            for s, t, r in zip(given_scores, tokens, rewards, strict=True)
        )
    )
    found = health(rows, UFT)
    scores = [sigmoid(x) for x in (1, 0, -1, -2)]
    assert found == {
        "responses/score": 4.0,
        "response_tokens/score": 4.0,
        # 6 nats and 3 top-1 tokens of each of the four, over 16 tokens.
        "entropy/score": 1.5,
        "top1/score": 0.75,
        "implicit_reward/score": pytest.approx(0.5),
        "implicit_score/score": pytest.approx(sum(scores) / 4),
        "log_ratio/score": pytest.approx(5.0),
        "log_ratio_per_token/score": pytest.approx((2.5 + 5 + 0 - 5) / 4),
        "saturated/score": 0.0,
        "saturated_fitted/score": 0.0,
        "saturated_stuck/score": 0.0,
        "score_error/score": pytest.approx(sum(abs(a - b) for a, b in zip(scores, given_scores, strict=True)) / 4),
        # Each in a bin of its own: 7, 5, 2, 1.
        "calibration_error/score": pytest.approx(
            sum(abs(a - b) for a, b in zip(scores, given_scores, strict=True)) / 4
        ),
        # Ranks 4, 3, 2, 1 against 4, 2, 3, 1: 1 - 6 (1 + 1) / (4 (16 - 1)).
        "rank_correlation/score": pytest.approx(0.8),
        # Ranks 4, 3, 2, 1 against 4, 1.5, 3, 1.5: centred 1.5, 0.5, -0.5, -1.5 and 1.5, -1, 0.5, -1.
        "length_correlation/score": pytest.approx((2.25 - 0.5 - 0.25 + 1.5) / math.sqrt(5 * 4.5)),
    }


def test_kinds_have_their_own_health() -> None:
    """Each under its name; kinds without responses have no entry."""
    found = health(table(row("instruction", 1.0, 3.0), row("binary", 0.0, -1.0), row("instruction", 1.0, 5.0)), UFT)
    assert {name.split("/")[1] for name in found} == {"instruction", "binary"}
    assert found["implicit_reward/instruction"] == 4.0
    assert found["implicit_reward/binary"] == -1.0
    assert found["responses/instruction"] == 2.0


@pytest.mark.parametrize(("size", "saturated"), [(5.9, 0), (5.986, 0), (5.987, 1), (6.1, 1)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_saturated_means_under_one_percent_of_the_largest_slope(size: float, saturated: int, sign: float) -> None:
    """s (1 - s) = 0.0025 at |r - shift| = 5.9864, whatever the reward itself is."""
    assert sigmoid(5.9864) * sigmoid(-5.9864) == pytest.approx(0.0025, rel=1e-4)
    for shift in (0.0, 2.0):
        found = health(table(row("score", 0.5, sign * size + shift, shift=shift)), UFT)
        assert found["saturated/score"] == saturated
        assert found["saturated_stuck/score"] == saturated, "0.998 is far from 0.5"
        assert found["saturated_fitted/score"] == 0


def test_saturated_ones_are_fitted_or_stuck() -> None:
    """Implicit scores of 0.99966 and 0.00034 against 1, 0.91, 0.89, 0 and 0.2: within 0.1 is fitted."""
    rewards_and_scores = [(8.0, 1.0), (8.0, 0.91), (8.0, 0.89), (-8.0, 0.0), (-8.0, 0.2), (-8.0, 1.0), (0.0, 0.0)]
    found = health(table(*(row("score", score, reward) for reward, score in rewards_and_scores)), UFT)
    assert found["saturated/score"] == pytest.approx(6 / 7)
    assert found["saturated_fitted/score"] == pytest.approx(3 / 7)
    assert found["saturated_stuck/score"] == pytest.approx(3 / 7)


def test_rows_without_a_reference_have_no_rewards() -> None:
    """Supervised fine-tuning: how many responses of how many tokens, and no name that would always be NaN."""
    found = health(
        table(*(row("instruction", 1.0, NAN, log_ratio=NAN, tokens=tokens) for tokens in (2, 4))), objective("nll")
    )
    assert found == {
        "responses/instruction": 2.0,
        "response_tokens/instruction": 3.0,
        "entropy/instruction": pytest.approx(12 / 6),
        "top1/instruction": pytest.approx(6 / 6),
    }


def test_entropy_and_top1_are_means_over_tokens_of_a_kind() -> None:
    """Sums of 6 and 1 nats over 4 + 1 tokens: 7 / 5, not the mean of 1.5 and 1; top-1 of 3 + 0 tokens: 3 / 5. Another
    kind plays no part; of rows that do not know them, as without a forward of ours, both are NaN."""
    rows = table(
        row("score", 1.0, 0.1),
        row("score", 0.0, 0.1, tokens=1, entropy=1.0, top1=0.0),
        row("instruction", 1.0, 0.1, entropy=NAN, top1=NAN),
    )
    found = health(rows, UFT)
    assert (found["entropy/score"], found["top1/score"]) == pytest.approx((7 / 5, 3 / 5))
    assert math.isnan(found["entropy/instruction"])
    assert math.isnan(found["top1/instruction"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_there(kind: Kind) -> None:
    """Of four responses that differ, in two pairs, none is missing."""
    rows = table(*(row(kind, s, s - 0.3, pair=n // 2, tokens=n + 1) for n, s in enumerate([1.0, 0.2, 0.7, 0.1])))
    expected = {"responses", "response_tokens", "entropy", "top1"} | OF_THE_REFERENCE | OF_PAIRS
    assert set(health(rows, UFT)) == {f"{name}/{kind}" for name in expected}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mse", True), ("l1", True), ("bce", False), ("raw", False), ("dpo", False), ("simpo", False), ("nll", False)],
)
def test_saturation_is_of_losses_that_lose_their_gradient(loss: str, expected: bool) -> None:
    """By kind: another kind's loss plays no part; beside others, mse still does."""
    of = {kind: KindObjective({"mse": 1.0}) for kind in KINDS} | {"pair": KindObjective({loss: 1.0})}
    rows = table(*two_sides(0, 9.0, -9.0), row("score", 1.0, 9.0))
    found = health(rows, Objective(of))
    assert found["saturated_fitted/score"] == 1.0
    assert {f"{name}/pair" in found for name in ("saturated", "saturated_fitted", "saturated_stuck")} == {expected}
    both = Objective(of | {"pair": KindObjective({loss: 1.0, "mse": 0.5})})
    assert health(rows, both)["saturated/pair"] == 1.0


def test_errors_under_raw_are_of_what_the_loss_compares() -> None:
    """Rewards 0.5 and -1.5, which mean 1 and -1, against 1 and 0: errors 0 and 1, each in an outermost bin."""
    rows = table(row("score", 1.0, 0.5), row("score", 0.0, -1.5))
    rows["implicit_score"] = implicit_scores(objective("raw"), rows)
    found = health(rows, objective("raw"))
    assert found["implicit_score/score"] == 0.0
    assert found["score_error/score"] == 0.5
    assert found["calibration_error/score"] == 0.5


def test_names_do_not_go_with_the_values() -> None:
    """Before the first step every reward is 0; of two responses there is no order: NaN, under the same names."""
    later = table(*(row("score", s, s, tokens=n + 1) for n, s in enumerate([0.1, 0.5, 0.3])))
    before = table(*(row("score", s, 0.0, tokens=n + 1) for n, s in enumerate([0.1, 0.5, 0.3])))
    for rows in (before, later[:2]):
        found = health(rows, UFT)
        assert found.keys() == health(later, UFT).keys()
        assert math.isnan(found["rank_correlation/score"])
        assert math.isnan(found["length_correlation/score"])


@pytest.mark.parametrize("broken", ["log_ratio", "reward", "shift", "logp", "all"])
@pytest.mark.parametrize("number", [0, slice(None)], ids=["one row", "all rows"])
def test_numbers_that_are_none_do_not_end_the_run(broken: str, number: int | slice) -> None:
    """A run that went wrong must say so, not stop in its telemetry: NaN stays NaN, and nothing is raised or warned."""
    rows = table(*(row("pair", s, s, pair=n // 2, tokens=n + 1) for n, s in enumerate([1.0, 0.2, 0.7, 0.1])))
    for name in ("log_ratio", "reward", "shift", "logp") if broken == "all" else (broken,):
        rows[name][number] = NAN
    rows["implicit_score"] = implicit_scores(UFT, rows)
    rows["pair_reward"] = pair_rewards(UFT.of_kind["pair"], rows)
    found = health(rows, UFT)
    assert found["responses/pair"] == 4.0
    if broken in ("reward", "all") and number == 0:
        assert math.isnan(found["implicit_reward/pair"])
        assert math.isnan(found["calibration_error/pair"])
        assert math.isnan(found["saturated/pair"])
        assert math.isnan(found["pair_accuracy/pair"])
        assert math.isnan(found["rank_correlation/pair"])


# ---- calibration


def test_calibration_by_hand() -> None:
    """Bins of a tenth: 0.05 and 0.08 against 0 and 1, 0.3 against 0.4, 0.95 and 1.0 against 0.9 and 1.

    |0.065 - 0.5| = 0.435 for two, 0.1 for one, |0.975 - 0.95| = 0.025 for two: (0.87 + 0.1 + 0.05) / 5 = 0.204.
    """
    scores, given_scores = np.array([0.95, 0.05, 0.3, 0.08, 1.0]), np.array([0.9, 0.0, 0.4, 1.0, 1.0])
    bins = calibration(scores, given_scores)
    assert [number for number, _, _ in bins] == [2, 1, 2]
    assert [(implicit, true) for _, implicit, true in bins] == [
        pytest.approx(pair) for pair in ((0.065, 0.5), (0.3, 0.4), (0.975, 0.95))
    ]
    assert calibration_error(scores, given_scores) == pytest.approx(0.204)


def test_calibration_is_about_means() -> None:
    """Half of what is called 0.75 is good 3 times of 4: error 0, though no single score is met."""
    assert calibration_error(np.full(8, 0.75), np.array([1.0, 1, 1, 0, 1, 0, 1, 1])) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_calibration_counts_every_response(pairs: list[tuple[float, float]]) -> None:
    """Bins hold all responses, none is empty, and the error is at most the mean score error."""
    scores, given_scores = np.array(pairs).T
    bins = calibration(scores, given_scores)
    assert sum(number for number, _, _ in bins) == len(pairs)
    assert calibration_error(scores, given_scores) <= np.abs(scores - given_scores).mean() + 1e-12
    assert len(bins) == len({min(int(score * 10), 9) for score in scores})


# ---- rank correlation


def ranks(numbers: list[float]) -> list[float]:
    """By counting: those below, and the middle of those equal."""
    return [sum(x < y for x in numbers) + (sum(x == y for x in numbers) + 1) / 2 for y in numbers]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3], [10, 200, 3000], 1.0),
        ([1, 2, 3], [3, 2, -5], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 x 2 / (4 x 15)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
    ],
)
def test_rank_correlation_by_hand(left: list[float], right: list[float], expected: float) -> None:
    """Only the order counts; equal values share the mean of their ranks."""
    assert rank_correlation(np.array(left), np.array(right)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("left", "right"),
    [([], []), ([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0] * 5, [1.0, 2, 3, 4, 5]), ([1.0, 2, 3], [0.5] * 3)],
)
def test_what_has_no_rank_correlation(left: list[float], right: list[float]) -> None:
    """Fewer than three responses, or all equal on one side: instruction data, whose scores are all 1."""
    assert math.isnan(rank_correlation(np.array(left), np.array(right)))


def test_what_has_no_order_has_no_rank_correlation() -> None:
    """NaN and infinite values are no order."""
    for bad in (NAN, math.inf):
        assert math.isnan(rank_correlation(np.array([1.0, bad, 3.0]), np.arange(3.0)))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
@settings(max_examples=100, deadline=None)
def test_rank_correlation_is_pearsons_of_ranks(pairs: list[tuple[int, int]]) -> None:
    """Against ranks by counting and the standard library's correlation; many equal values."""
    left, right = ([float(x) for x in side] for side in zip(*pairs, strict=True))
    found = rank_correlation(np.array(left), np.array(right))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(statistics.correlation(ranks(left), ranks(right)), abs=1e-12)


# ---- what rounding of a stored reference may have exchanged is equal


def untrained(sizes: list[float], rounding: float, kind: Kind = "score", **options: Any) -> np.ndarray:
    """Responses whose log-ratios are noise around 0, with scores and lengths that differ."""
    return table(
        *(
            row(kind, i % 3 / 2, 0.1 * size, log_ratio=size, rounding=rounding, tokens=4 + i, **options)
            for i, size in enumerate(sizes)
        )
    )


NOISE = [-3e-7, 2e-7, 0.0, -5e-7, 6e-7, 1e-7]


def test_noise_of_a_stored_reference_has_no_order() -> None:
    """All values may be one: no rank and no length correlation, as where all are exactly 0. Without the bound the same
    noise gives both."""
    found = health(untrained(NOISE, 1e-6), UFT)
    assert math.isnan(found["rank_correlation/score"])
    assert math.isnan(found["length_correlation/score"])
    unbounded = health(untrained(NOISE, 0.0), UFT)
    assert abs(unbounded["rank_correlation/score"]) > 0.1
    assert abs(unbounded["length_correlation/score"]) > 0.1


def test_noise_of_a_stored_reference_divides_no_bin() -> None:
    """Implicit scores around 1/2 lie in one bin, as 1/2 itself does: scores 0, 1/2 and 1 are calibrated on average."""
    exact = health(untrained([0.0] * 6, 0.0), UFT)["calibration_error/score"]
    assert exact == pytest.approx(0.0, abs=1e-12)
    assert health(untrained(NOISE, 1e-6), UFT)["calibration_error/score"] == pytest.approx(exact, abs=1e-6)
    assert health(untrained(NOISE, 0.0), UFT)["calibration_error/score"] > 0.1


@pytest.mark.parametrize(("loss", "is_a_token"), [("dpo", False), ("ipo", True), ("mse", False)])
def test_noise_of_a_stored_reference_orders_no_pair(loss: str, is_a_token: bool) -> None:
    """A margin within the rounding of its two sides is a tie, in the unit of the loss: 0.1 x (1 + 1) nats over 4 tokens
    for ipo, 0.1 x (1 + 1) for others. A larger margin counts."""
    bound = 0.1 * 2 / (4 if is_a_token else 1)
    for margin, expected in ((bound * 0.99, 0.5), (-bound * 0.99, 0.5), (bound * 1.01, 1.0), (-bound * 1.01, 0.0)):
        rows = table(*two_sides(0, margin, 0.0, rounding=1.0))
        assert health(rows, objective(loss))["pair_accuracy/pair"] == expected, margin


def test_a_loss_without_reference_has_no_rounding_of_it() -> None:
    """SimPO orders log-probs of the policy alone, beside a loss that compares with a stored reference."""
    rows = table(*two_sides(0, 1e-3, 0.0, rounding=1.0))
    both = {kind: KindObjective({"simpo": 1.0, "mse": 1.0}, beta=0.1) for kind in KINDS}
    assert health(rows, Objective(both))["pair_accuracy/pair"] == 1.0


def test_a_chain_of_near_values_is_no_tie() -> None:
    """Neighbours are equal, the ends are not: 1 to 40 in steps of one bound keep nearly their whole order."""
    values = np.arange(40.0)
    assert rank_correlation(values, values, 0.5) > 0.99
    assert math.isnan(rank_correlation(values, values, 20.0))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6), st.integers(0, 4)), min_size=3, max_size=30))
@settings(max_examples=100, deadline=None)
def test_ranks_within_rounding_by_comparing_all(entries: list[tuple[int, int, int]]) -> None:
    """Against the definition, each value with each: those below for sure, and half of those that may be equal."""
    left, right, bounds = (np.array(side, dtype=float) for side in zip(*entries, strict=True))
    below = [sum(x + a < y - b for x, a in zip(left, bounds, strict=True)) for y, b in zip(left, bounds, strict=True)]
    equal = [
        sum(abs(x - y) <= a + b for x, a in zip(left, bounds, strict=True)) for y, b in zip(left, bounds, strict=True)
    ]
    by_hand = [n + (m + 1) / 2 for n, m in zip(below, equal, strict=True)]
    found = rank_correlation(left, right, bounds)
    if len(set(by_hand)) == 1 or len(set(right)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(statistics.correlation(by_hand, ranks(list(right))), abs=1e-12)


# ---- pairs


def two_sides(number: int, chosen: float, rejected: float, **options: Any) -> list[tuple[Any, ...]]:
    return [row("pair", 1.0, chosen, pair=number, **options), row("pair", 0.0, rejected, pair=number, **options)]


def test_pairs_by_hand() -> None:
    """Margins 2, 0, -1 and 3: mean 1, right 1 + 1/2 + 0 + 1 of 4. A shift moves both sides: no part of a margin."""
    rows = table(
        *two_sides(0, 1.5, -0.5), *two_sides(1, 0.0, 0.0), *two_sides(2, -2.0, -1.0), *two_sides(3, 4.0, 1.0, shift=9.0)
    )
    rows["logp"] = [-1, -2, -3, -4, -5, -6, -7, -8]
    found = health(rows, UFT)
    assert found["pair_margin/pair"] == 1.0
    assert found["pair_accuracy/pair"] == 0.625
    assert found["implicit_reward_chosen/pair"] == pytest.approx((1.5 + 0 - 2 + 4) / 4)
    assert found["implicit_reward_rejected/pair"] == pytest.approx((-0.5 + 0 - 1 + 1) / 4)
    assert (found["logp_chosen/pair"], found["logp_rejected/pair"]) == (-4.0, -5.0)


def test_before_the_first_step_half_the_pairs_are_right() -> None:
    """Every margin is exactly 0: neither right nor wrong."""
    assert health(table(*two_sides(0, 0.0, 0.0), *two_sides(1, 0.0, 0.0)), UFT)["pair_accuracy/pair"] == 0.5


def test_pairs_without_a_reference() -> None:
    """ORPO: rewards of its own, and all that is said of pairs; nothing of a reference."""
    uft = objective("odds_ratio")
    rows = table(*two_sides(0, NAN, NAN, log_ratio=NAN), *two_sides(1, NAN, NAN, log_ratio=NAN))
    rows["logp"], rows["tokens"], rows["pair_reward"] = [-4, -3, -9, -4], [4, 1, 3, 4], [2.0, 1.0, -3.0, -1.0]
    assert health(rows, uft) == {
        "responses/pair": 4.0,
        "response_tokens/pair": 3.0,
        "entropy/pair": 24 / 12,
        "top1/pair": 12 / 12,
        "logp_chosen/pair": -6.5,
        "logp_rejected/pair": -3.5,
        "implicit_reward_chosen/pair": -0.5,
        "implicit_reward_rejected/pair": 0.0,
        "pair_margin/pair": -0.5,
        "pair_accuracy/pair": 0.5,
    }


@given(order=st.permutations(range(7)), cut=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_sides_are_found_in_any_order(order: list[int], cut: int) -> None:
    """Five pairs, a side that lost its other one, and a single response, in the tables of two ranks: five pairs."""
    units = [table(*two_sides(3 * n, n + 0.5, -n)) for n in range(5)]
    units += [table(row("pair", 1.0, 99.0, pair=100)), table(row("pair", 1.0, 98.0))]
    ranks_of = [[units[i] for i in part] for part in (order[:cut], order[cut:])]
    rows = np.concatenate([np.concatenate([units[0][:0], *part]) for part in ranks_of])
    chosen, rejected = sides(rows)
    assert chosen["pair"].tolist() == rejected["pair"].tolist() == [0, 3, 6, 9, 12]
    assert chosen["reward"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert rejected["reward"].tolist() == [0.0, -1.0, -2.0, -3.0, -4.0]


def test_no_pairs_no_sides() -> None:
    """Empty tables and single responses: nothing, and no name of pairs."""
    assert [len(side) for side in sides(table(row("score", 1.0, 1.0))[:0])] == [0, 0]
    assert [len(side) for side in sides(table(row("score", 1.0, 1.0)))] == [0, 0]
    assert not any(name.split("/")[0] in OF_PAIRS for name in health(table(row("pair", 1.0, 1.0)), UFT))
