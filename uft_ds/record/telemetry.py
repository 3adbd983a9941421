"""Health metrics of a run, for each kind: numbers over the responses of a step or of the held-out data.

All of them are computed from one table with one row per response, gathered from all ranks.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Kind
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.host.files import write_atomically
from uft_ds.objectives.baselines import Baselines
from uft_ds.objectives.losses import NEEDS_REFERENCE, OF_HEAD, PAIRWISE, POINTWISE, REFERENCE_FREE
from uft_ds.objectives.objective import KindObjective, Objective, rewards_of
from uft_ds.objectives.pairwise import log_odds
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM, REWARD_STREAM

ROW = np.dtype(
    [
        ("kind", "u1"), ("pair", "<i8"), ("score", "<f8"), ("tokens", "<f8"),
        ("logp", "<f8"), ("log_ratio", "<f8"), ("reward", "<f8"), ("shift", "<f8"), ("implicit_score", "<f8"),
        ("pair_reward", "<f8"), ("entropy", "<f8"), ("top1", "<f8"), ("rounding", "<f8"), ("score_shift", "<f8"),
        ("advantage", "<f8"),
    ]
)  # fmt: skip
"""A row of the table. kind: index into KINDS. pair: the pair's number in the step, -1 for none; the chosen response
comes first. logp, log_ratio: nats, summed over tokens. reward: before the shift. log_ratio, reward and implicit_score
are NaN without a reference. With a reward head, reward is its value, implicit_score that value's sigmoid, and all of
the policy is NaN. pair_reward: the quantity whose difference the pair's loss uses; NaN without a pair.
entropy: the policy's, nats, summed over tokens. top1: number of tokens that are the policy's most probable ones.
rounding: how far log_ratio may be off because the reference's log-prob was stored, nats; 0 for a forwarded one. Two
log-ratios that it may have moved past each other count as equal. score_shift: what is subtracted from the score before
a pointwise loss compares it: of a centred response the mean score of its group - 1/2, else 0. advantage: the factor of
a policy gradient loss, of a centred response score - mean score; NaN for the others."""

SATURATED_BELOW = 0.01 * 0.25
"""A response is saturated if s (1 - s) of its implicit score s is below 1% of the maximum; mse and l1 then have almost
no gradient."""

_CAN_SATURATE = frozenset({"mse", "l1"})
"""The gradients of the other pointwise losses do not vanish: bce's is s - score, and raw has no sigmoid."""

FITTED_WITHIN = 0.1
"""A saturated response is fitted if its implicit score differs from its score by at most this; else it is stuck."""

CALIBRATION_BINS = 10
"""Number of equal bins of the implicit score."""

_CSV_COLUMNS = (
    "origin", "kind", "pair", "score", "implicit_score", "implicit_reward", "reward_shift", "log_ratio", "logp",
    "tokens", "pair_reward", "entropy", "top1", "rounding", "target",
)  # fmt: skip
_FEWEST = 3
"""The fewest responses for which a correlation is computed; with fewer it means nothing."""


def response_rows(
    objective: Objective,
    batch: MicroBatch,
    logps: Mapping[str, Tensor],
    baselines: Baselines | None,
    *,
    entropy_R: Tensor | None = None,
    top1_R: Tensor | None = None,
    rounding: float = 0.0,
) -> np.ndarray:
    """The table of one micro-batch: [responses] of ROW. Columns of arguments that are None hold NaN (shifts: 0).

    Args:
        logps: by stream, [responses], nats, or a reward head's values; without a stream, its columns hold NaN.
        rounding: nats per square root of a response's tokens.
    """
    rows = np.zeros(batch.num_responses, dtype=ROW)
    rows["kind"] = [KINDS.index(response.kind) for response in batch.responses]
    rows["pair"] = [-1 if response.pair_id is None else response.pair_id for response in batch.responses]
    rows["score"] = [response.score for response in batch.responses]
    rows["tokens"] = [response.num_tokens for response in batch.responses]
    rows["logp"] = rows["log_ratio"] = rows["reward"] = np.nan
    rows["entropy"] = np.nan if entropy_R is None else entropy_R.cpu().numpy()
    rows["top1"] = np.nan if top1_R is None else top1_R.cpu().numpy()
    if objective.reward == "head":
        rows["reward"] = logps[REWARD_STREAM].cpu().numpy()
    else:
        rows["logp"] = logps[POLICY_STREAM].cpu().numpy()
    if REFERENCE_STREAM in logps:
        rewards = rewards_of(objective, batch, logps[POLICY_STREAM], logps[REFERENCE_STREAM])
        assert rewards.log_ratios_R is not None
        rows["log_ratio"], rows["reward"] = rewards.log_ratios_R.cpu().numpy(), rewards.rewards_R.cpu().numpy()
        rows["rounding"] = rounding * np.sqrt(rows["tokens"])
    rows["advantage"] = np.nan
    if baselines is not None:
        rows["shift"], targets_R, rows["advantage"] = (column_R.cpu().numpy() for column_R in baselines.columns)
        # Both in float32, as the loss compares them: exactly 0 for a response whose target is its score.
        rows["score_shift"] = rows["score"].astype(np.float32) - targets_R.astype(np.float32)
    rows["implicit_score"] = implicit_scores(objective, rows)
    rows["pair_reward"] = np.where(rows["pair"] >= 0, pair_rewards(objective.of_kind["pair"], rows), np.nan)
    return rows


def implicit_scores(objective: Objective, rows: np.ndarray) -> np.ndarray:
    """The value that each row's loss compares with its score: sigmoid(r), r = reward - shift; for `raw` r + 1/2.

    A kind with `raw` and another pointwise loss has sigmoid(r).
    """
    rewards = rows["reward"] - rows["shift"]
    raw = [code for code, kind in enumerate(KINDS) if objective.of_kind[kind].losses.keys() & set(POINTWISE) == {"raw"}]
    return np.asarray(np.where(np.isin(rows["kind"], raw), rewards + 0.5, 0.5 * (1 + np.tanh(rewards / 2))))


def targets(rows: np.ndarray) -> np.ndarray:
    """What the implicit score of each row is compared with: the score, or a centred response's target."""
    return np.asarray(rows["score"] - rows["score_shift"])


def pair_rewards(of: KindObjective, rows: np.ndarray) -> np.ndarray:
    """The quantity whose difference the kind's pair loss uses; of several, the first with a reference, else the first.

        with a reference  beta * log_ratio, as `reward`       odds_ratio  log odds of the mean token probability
        simpo             beta * log pi per token             no loss     log pi per token
        contrast          beta * log pi
        bradley_terry     the reward head's value

    A kind without a pair loss but with a pointwise loss, which has a reference, uses `reward`, too.
    """
    loss = _deciding_loss(of)
    if loss in OF_HEAD:
        return np.asarray(rows["reward"])
    a_token = rows["logp"] / rows["tokens"]
    if loss == "simpo":
        return np.asarray(of.beta * a_token)
    if loss == "contrast":
        return np.asarray(of.beta * rows["logp"])
    if loss == "odds_ratio":
        return log_odds(torch.from_numpy(a_token)).numpy()
    return np.asarray(rows["reward"] if compares_with_reference(of) else a_token)


def compares_with_reference(of: KindObjective) -> bool:
    """Whether the kind's `pair_rewards` are `reward`, and not those of a loss without a reference."""
    return _deciding_loss(of) not in (*REFERENCE_FREE, *OF_HEAD) and bool(NEEDS_REFERENCE & of.losses.keys())


def _deciding_loss(of: KindObjective) -> str | None:
    return next((name for name in (*PAIRWISE, *REFERENCE_FREE, *OF_HEAD) if name in of.losses), None)


def write_rows(path: Path, rows: np.ndarray, origins: Seq[str]) -> None:
    """Write the table as CSV, for a look at single responses; the columns are named as in the metrics.

    Args:
        origins: `file:line` of each row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row, origin in zip(rows.tolist(), origins, strict=True):
        value = dict(zip(ROW.names or (), row, strict=True))
        pair = "" if value["pair"] < 0 else value["pair"]
        shift = math.nan if math.isnan(value["reward"]) else value["shift"]  # without a reward there is no shift
        numbers = [value["score"], value["implicit_score"], value["reward"], shift, value["log_ratio"], value["logp"]]
        target = value["score"] - value["score_shift"]
        further = [value["pair_reward"], value["entropy"], value["top1"], value["rounding"], target]
        shown, after = (["" if math.isnan(x) else f"{x:.9g}" for x in part] for part in (numbers, further))
        writer.writerow([origin, KINDS[value["kind"]], pair, *shown, int(value["tokens"]), *after])
    write_atomically(path, text.getvalue())


def read_rows(path: Path) -> np.ndarray:
    """Read the table that `write_rows` wrote; numbers have nine digits. It is empty if there is no such file."""
    if not path.exists():
        return np.zeros(0, dtype=ROW)
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = np.zeros(len(lines), dtype=ROW)

    def number(text: str) -> float:
        return float(text) if text else math.nan

    rows["kind"] = [KINDS.index(line["kind"]) for line in lines]
    rows["pair"] = [int(line["pair"] or -1) for line in lines]
    for name in ("score", "tokens", "logp", "log_ratio", "implicit_score", "pair_reward"):
        rows[name] = [number(line[name]) for line in lines]
    rows["reward"] = [number(line["implicit_reward"]) for line in lines]
    rows["shift"] = [number(line["reward_shift"] or "0") for line in lines]
    for name in ("entropy", "top1"):
        rows[name] = [number(line.get(name) or "") for line in lines]
    rows["rounding"] = [number(line.get("rounding") or "0") for line in lines]  # absent in files of older versions
    rows["score_shift"] = [number(line["score"]) - number(line.get("target") or line["score"]) for line in lines]
    rows["advantage"] = np.nan  # held-out responses have none of a policy gradient loss, and the file holds no other
    return rows


def health(rows: np.ndarray, objective: Objective) -> dict[str, float]:
    """All health metrics, named NAME/KIND; a kind without responses has none.

    An undefined number is NaN and not left out, so that the names do not depend on the values.
    """
    metrics: dict[str, float] = {}
    for code, kind in enumerate(KINDS):
        of_kind = rows[rows["kind"] == code]
        if len(of_kind):
            values = _amounts(of_kind, objective) | _pairs(of_kind, objective)
            if objective.reward == "head":
                values |= _of_head(of_kind)
            elif objective.needs_reference:
                values |= _against_reference(of_kind, objective)
            if can_saturate(objective, kind):
                values |= _saturation(of_kind)
            metrics |= {f"{name}/{kind}": float(value) for name, value in values.items()}
    return metrics


def can_saturate(objective: Objective, kind: Kind) -> bool:
    """Whether the kind has a loss that loses its gradient when the sigmoid saturates."""
    return bool(_CAN_SATURATE & objective.of_kind[kind].losses.keys())


def _amounts(rows: np.ndarray, objective: Objective) -> dict[str, float]:
    tokens = rows["tokens"].sum()
    amounts = {"responses": len(rows), "response_tokens": rows["tokens"].mean()}
    if objective.reward == "head":  # it predicts no token
        return amounts
    return amounts | {"entropy": rows["entropy"].sum() / tokens, "top1": rows["top1"].sum() / tokens}


def _of_head(rows: np.ndarray) -> dict[str, float]:
    rewards, scores, given = rows["reward"], rows["implicit_score"], rows["score"]
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "score_error": np.abs(scores - given).mean(),
        "calibration_error": calibration_error(scores, given),
        "rank_correlation": rank_correlation(rewards, given),
        "length_correlation": rank_correlation(rewards, rows["tokens"]),
    }


def reward_rounding(rows: np.ndarray, objective: Objective) -> np.ndarray:
    """How far each row's reward may be off, from its log-ratio's `rounding`: [rows], in the unit of rewards."""
    betas = np.array([objective.of_kind[kind].beta for kind in KINDS])[rows["kind"]]
    is_a_token = np.array([objective.compares_means(kind) for kind in KINDS])[rows["kind"]]
    return np.asarray(betas * rows["rounding"] / np.where(is_a_token, rows["tokens"], 1.0))


def _against_reference(rows: np.ndarray, objective: Objective) -> dict[str, float]:
    scores, given = rows["implicit_score"], targets(rows)
    rounding = reward_rounding(rows, objective)
    raised = rows.copy()
    raised["reward"] += rounding
    return {
        "implicit_reward": rows["reward"].mean(),
        "implicit_score": scores.mean(),
        "log_ratio": rows["log_ratio"].mean(),
        "log_ratio_per_token": (rows["log_ratio"] / rows["tokens"]).mean(),
        "score_error": np.abs(scores - given).mean(),
        "calibration_error": calibration_error(scores, given, implicit_scores(objective, raised)),
        # From rewards, not from implicit scores: the scores of large rewards are all 1 and cannot be ranked.
        "rank_correlation": rank_correlation(rows["reward"] - rows["shift"], given, rounding),
        "length_correlation": rank_correlation(rows["log_ratio"], rows["tokens"], rows["rounding"]),
    }


def _saturation(rows: np.ndarray) -> dict[str, float]:
    scores = rows["implicit_score"]
    if not np.isfinite(scores).all():
        return dict.fromkeys(("saturated", "saturated_fitted", "saturated_stuck"), float("nan"))
    saturated = scores * (1 - scores) < SATURATED_BELOW
    stuck = saturated & (np.abs(scores - targets(rows)) > FITTED_WITHIN)
    return {
        "saturated": saturated.mean(),
        "saturated_fitted": (saturated & ~stuck).mean(),
        "saturated_stuck": stuck.mean(),
    }


def _pairs(rows: np.ndarray, objective: Objective) -> dict[str, float]:
    chosen, rejected = sides(rows)
    if not len(chosen):
        return {}
    margins = chosen["pair_reward"] - rejected["pair_reward"]
    rounding = np.zeros(len(chosen))
    if compares_with_reference(objective.of_kind["pair"]):
        rounding = reward_rounding(chosen, objective) + reward_rounding(rejected, objective)
    signs = np.where(np.abs(margins) <= rounding, 0.0, np.sign(margins))
    # Before the first step every margin of implicit rewards is exactly 0, which counts as half right.
    compared = {"pair_margin": margins.mean(), "pair_accuracy": (signs / 2 + 0.5).mean()}
    if objective.reward == "head":
        return {
            "reward_chosen": chosen["reward"].mean(),
            "reward_rejected": rejected["reward"].mean(),
            **compared,
        }
    return {
        "logp_chosen": chosen["logp"].mean(),
        "logp_rejected": rejected["logp"].mean(),
        "implicit_reward_chosen": chosen["pair_reward"].mean(),
        "implicit_reward_rejected": rejected["pair_reward"].mean(),
        **compared,
    }


def sides(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen and the rejected rows of complete pairs, in the same order."""
    paired = rows[rows["pair"] >= 0]
    order = np.argsort(paired["pair"], kind="stable")  # keeps the chosen response before the rejected one
    paired = paired[order]
    first = np.flatnonzero(paired["pair"][:-1] == paired["pair"][1:])
    return paired[first], paired[first + 1]


def calibration(
    scores: np.ndarray, given: np.ndarray, highest: np.ndarray | None = None
) -> list[tuple[int, float, float]]:
    """(number of responses, mean implicit score, mean given score) for each bin of the implicit score with responses.

    Implicit scores outside [0, 1], which `raw` allows, are in the outermost bins.

    Args:
        highest: what each implicit score may be but for rounding. A score that rounding may have moved below the edge
            of a bin counts as on the edge: else responses of one score, such as 1/2, would be divided by chance.
    """
    edges = scores if highest is None else highest
    bins = np.clip(edges * CALIBRATION_BINS, 0, CALIBRATION_BINS - 1).astype(int)
    members = [bins == number for number in range(CALIBRATION_BINS)]
    return [
        (int(inside.sum()), float(scores[inside].mean()), float(given[inside].mean()))
        for inside in members
        if inside.any()
    ]


def calibration_error(scores: np.ndarray, given: np.ndarray, highest: np.ndarray | None = None) -> float:
    """Expected calibration error: the mean over responses of |mean implicit - mean given score| of their bin.

    Args:
        highest: see `calibration`.
    """
    if not np.isfinite(scores).all():
        return math.nan
    bins = calibration(scores, given, highest)
    return sum(number * abs(implicit - true) for number, implicit, true in bins) / len(scores)


def rank_correlation(left: np.ndarray, right: np.ndarray, rounding: np.ndarray | float = 0.0) -> float:
    """Spearman's rank correlation, with mean ranks for equal values.

    NaN if all values of one side are equal, or for fewer than three responses.

    Args:
        rounding: how far each value of `left` may be off. Two values count as equal if it may have exchanged them.
    """
    if len(left) < _FEWEST or not np.isfinite(left).all():
        return math.nan
    ranks, others = _mean_ranks(left, rounding), _mean_ranks(right)
    if np.ptp(ranks) == 0 or np.ptp(others) == 0:
        return math.nan
    return float(np.corrcoef(ranks, others)[0, 1])


def _mean_ranks(values: np.ndarray, rounding: np.ndarray | float = 0.0) -> np.ndarray:
    """The rank of each value: 1 + the values below it + half of those that equal it; equal: the intervals overlap.

    Each value is compared with each other one, so equality need not be transitive: a chain of near values is no tie.
    """
    lowest, highest = values - rounding, values + rounding
    below = np.searchsorted(np.sort(highest), lowest, side="left")
    above = len(values) - np.searchsorted(np.sort(lowest), highest, side="right")
    return np.asarray((len(values) + 1 + below - above) / 2)
