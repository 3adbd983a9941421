"""The metrics of a step, by their names, from the sums of its losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy import objective

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss
from uft_ds.record.metrics import step_metrics
from uft_ds.record.telemetry import ROW, response_rows


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def single(kind: Kind, score: float, num_tokens: int, pair_id: int | None = None) -> Sequence:
    response = Response(1, 1 + num_tokens, score, kind, kind, pair_id)
    return Sequence(np.arange(1 + num_tokens, dtype=np.int32), (response,))


def metrics_of(
    uft: Objective, sequences: list[Sequence], policy: list[float], reference: list[float] | None
) -> tuple[float, dict[str, float]]:
    """The loss of a step that is one micro-batch, and its metrics."""
    batch = micro_batch(sequences)
    logps_R, reference_R = values(*policy), None if reference is None else values(*reference)
    logps = {"policy": logps_R} if reference_R is None else {"policy": logps_R, "reference": reference_R}
    loss, sums = micro_batch_loss(uft, batch, count_terms(uft, batch.responses), logps)
    rows = response_rows(uft, batch, logps, None)
    return loss.item(), step_metrics(uft, loss.item(), sums, rows)


def test_metrics_of_a_step_by_hand() -> None:
    """One loss a kind: its mean over responses under `loss/KIND` alone; the step's loss is the mean over all three."""
    sequences = [single("instruction", 1.0, 1), single("score", 0.5, 2), single("instruction", 1.0, 3)]
    loss, metrics = metrics_of(objective("mse"), sequences, [80.0, 10.0, -70.0], [0.0, 0.0, 0.0])
    assert metrics["loss"] == loss
    of_instruction = [(sigmoid(8) - 1) ** 2, (sigmoid(-7) - 1) ** 2]
    assert metrics["loss/instruction"] == pytest.approx(sum(of_instruction) / 2)
    assert metrics["loss/score"] == pytest.approx((sigmoid(1.0) - 0.5) ** 2)
    assert loss == pytest.approx((sum(of_instruction) + metrics["loss/score"]) / 3)
    assert metrics["log_ratio/instruction"] == pytest.approx(5.0)
    assert metrics["implicit_reward/score"] == pytest.approx(1.0)
    assert metrics["implicit_score/score"] == pytest.approx(sigmoid(1.0))
    assert metrics["response_tokens/instruction"] == 2.0
    assert metrics["saturated_stuck/instruction"] == 0.5
    assert not any(name.startswith("loss/") and name.count("/") > 1 for name in metrics)
    assert not any("/binary" in name or "/pair" in name for name in metrics)


def test_a_kinds_losses_are_summed_and_shown() -> None:
    """Pairs under {dpo: 2, nll: 0.5}, with a kind's weight of 3 that stays out of it.

    D = 0.1 (6 - 2) = 0.4; nll 8 nats on 4 tokens: 2 a token. loss/pair = 2 x dpo + 0.5 x 2.
    """
    of = KindObjective({"dpo": 2.0, "nll": 0.5}, weight=3.0, beta=0.1)
    uft = Objective({**dict.fromkeys(KINDS, KindObjective({"mse": 1.0})), "pair": of})
    sequences = [single("pair", 1.0, 4, pair_id=0), single("pair", 0.0, 2, pair_id=0)]
    loss, metrics = metrics_of(uft, sequences, [-8.0, -3.0], [-14.0, -5.0])
    dpo = math.log1p(math.exp(-0.4))
    assert metrics["loss/pair/dpo"] == pytest.approx(dpo)
    assert metrics["loss/pair/nll"] == pytest.approx(2.0)
    assert metrics["loss/pair"] == pytest.approx(2 * dpo + 1.0)
    assert loss == metrics["loss"] == pytest.approx(3 * (2 * dpo + 1.0))
    assert metrics["pair_margin/pair"] == pytest.approx(0.4)
    assert metrics["pair_accuracy/pair"] == 1.0


def test_a_loss_without_terms_is_not_named() -> None:
    """Bad labels alone under {bce, nll}: nothing is imitated, so the sum is bce's and stands alone."""
    of = KindObjective({"bce": 1.0, "nll": 0.5}, beta=0.1)
    uft = Objective(dict.fromkeys(KINDS, of))
    _, metrics = metrics_of(uft, [single("binary", 0.0, 2)], [-3.0], [-3.0])
    assert metrics["loss/binary"] == pytest.approx(math.log(2))
    assert not any(name.startswith("loss/binary/") for name in metrics)


def test_loss_of_nll_is_reported_as_a_mean_over_tokens() -> None:
    """Instruction responses of 1 and 3 tokens with 1 and 9 nats: 10 / 4, not the mean of 1 and 9; no rewards."""
    sequences = [single("instruction", 1.0, 1), single("instruction", 1.0, 3), single("score", 1.0, 2)]
    loss, metrics = metrics_of(objective("nll"), sequences, [-1.0, -9.0, 0.0], None)
    assert metrics["loss/instruction"] == pytest.approx(2.5)
    assert loss == pytest.approx(10 / 6)
    assert not any("log_ratio" in name or "implicit" in name or "saturated" in name for name in metrics)


def test_sums_of_ranks_may_be_added() -> None:
    """Two halves' sums give the whole's means: numbers are added, never means."""
    uft, sequences = objective("l1"), [single("score", s, 1) for s in (0.1, 0.5, 0.8)]
    parts = []
    for part, logps in ((sequences[:2], values(4.0, -3.0)), (sequences[2:], values(1.0))):
        _, sums = micro_batch_loss(
            uft, micro_batch(part), {"l1": 3}, {"policy": logps, "reference": torch.zeros_like(logps)}
        )
        assert sums.shape == (2, len(KINDS), len(LOSSES))
        parts.append(sums)
    _, whole = metrics_of(uft, sequences, [4.0, -3.0, 1.0], [0.0, 0.0, 0.0])
    metrics = step_metrics(uft, whole["loss"], parts[0] + parts[1], np.zeros(0, dtype=ROW))
    assert metrics["loss/score"] == pytest.approx(whole["loss/score"])
    assert set(metrics) == {"loss", "loss/score"}
