"""Forward passes without an update: the checks before the first step, and the evaluation on held-out data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch

from uft_ds.data.example import KINDS, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.pool import Pool
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed
from uft_ds.host.signals import NEVER, Stop
from uft_ds.known.cache import Known
from uft_ds.objectives.groups import groups_of
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM
from uft_ds.objectives.shifts import StepShift
from uft_ds.record.metrics import step_metrics
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import Forwarded, Method, baselines_of, forward, rows_of, streams_of
from uft_ds.training.shifts import compared_on_device, means_of

SPOT_CHECK_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Allowed change of a response's log-prob by rounding in another packing, in nats; to be multiplied by the square root
of its tokens. Measured on a 135M model and real rows: 7e-6 in float32, 0.12 in bfloat16. The log-probs of another model
differ by half a nat per token."""

SPOT_CHECKED_PER_RANK = 8
"""Number of sequences that are checked for each data rank."""


@dataclass(frozen=True)
class SpotCheck:
    """Result of comparing stored log-probs with live ones.

    difference: nats, of the response that differs most relative to what its length allows. origin: that response's.
    agrees: whether all differences are allowed.
    """

    num_responses: int
    difference: float
    origin: str
    agrees: bool


def check_log_ratios_are_zero(engine: Engine, step: Step, *, tokens_per_micro_batch: int, tolerance: float) -> float:
    """Refuse to start unless policy and reference agree on every response of a step. Every rank must call it.

    Args:
        tolerance: the largest allowed |log-ratio|, nats; 0 for exact agreement.
    Returns:
        the largest |log-ratio| over all ranks, nats.
    Raises:
        CheckFailed: on every rank; the message names the response that differs most.
    """
    worst = (0.0, "")
    for batch in engine.micro_batches(step, tokens_per_micro_batch):
        logps = logps_of(engine(batch, streams_of(engine, with_reference=True)), batch)
        ratios = (logps[POLICY_STREAM].detach() - logps[REFERENCE_STREAM]).abs().nan_to_num(nan=float("inf")).tolist()
        del logps  # frees the graph before the next forward builds its own
        origins = (response.origin for response in batch.responses)
        worst = max([worst, *zip(ratios, origins, strict=True)])
    largest, origin = max(engine.gather_objects(worst))
    if largest > tolerance:
        raise CheckFailed(
            f"before the first step the log-ratio of {origin} is {largest:.3g} nats, allowed {tolerance}: policy and "
            "reference do not compute the same thing (reference.step_zero_tolerance may allow for a GPU's rounding)"
        )
    return largest


def check_reference_cache(
    engine: Engine,
    cache: Known,
    pools: Seq[Pool],
    *,
    tokens_per_micro_batch: int,
    dtype: torch.dtype,
) -> SpotCheck | None:
    """Compare stored log-probs with the reference's own forward, on known responses drawn from all data.

    Every rank must call it.

    Returns:
        the same result on every rank; None if nothing is known.
    """
    chosen = Step(0, known_sequences(cache, pools, SPOT_CHECKED_PER_RANK * engine.ranks.data_size))
    if not chosen.sequences:
        return None
    worst = (0.0, 0.0, "")
    with engine.evaluating():
        for batch in engine.micro_batches(chosen, tokens_per_micro_batch):
            live = logps_of(engine(batch, [engine.streams[REFERENCE_STREAM]]), batch)[REFERENCE_STREAM].tolist()
            for key, value, response in zip(batch.response_keys, live, batch.responses, strict=True):
                # `max` would drop a NaN that is not first.
                difference = abs(value - cache.known(key)) if math.isfinite(value) else math.inf
                allowed = SPOT_CHECK_NATS[dtype] * response.num_tokens**0.5
                worst = max(worst, (difference / allowed, difference, response.origin))
    share, difference, origin = max(engine.gather_objects(worst))
    return SpotCheck(len(chosen.responses), difference, origin, agrees=share <= 1.0)


def known_sequences(cache: Known, pools: Seq[Pool], count: int) -> tuple[Sequence, ...]:
    """At most `count` different fully known sequences, drawn at random from all data, the same on every rank."""
    if not cache.num_known:
        return ()
    ends = np.cumsum([len(pool) for pool in pools])
    found: dict[tuple[bytes, ...], Sequence] = {}
    # A fixed seed: every rank must draw the same sequences.
    for place in np.random.default_rng(0).permutation(int(ends[-1])).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        pool, index = pools[number], place - int(ends[number]) + len(pools[number])
        if all(cache.has(key) for key in pool.keys_of(index)):
            found |= {sequence.response_keys: sequence for sequence in pool.unit(index, pair_id=place)}
        if len(found) >= count:
            break
    return tuple(found.values())[:count]


class Evaluation(NamedTuple):
    """metrics: named `held_out/...`. rows: the table of all held-out responses. origins: `file:line` of each row."""

    metrics: dict[str, float]
    rows: np.ndarray
    origins: list[str]


def evaluate(
    method: Method,
    groups: Seq[Step],
    shift: float = 0.0,
    stop: Stop = NEVER,
    on_done: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """The metrics of held-out data, computed as if all groups were one step. Every rank must call it.

    Responses of data have no policy gradient loss: the policy did not give them. If no response has any loss, there is
    no `held_out/loss`.

    Args:
        groups: the held-out data, divided into parts that are forwarded one after another.
        shift: the shift state that the last step returned, nats.
        on_done: called after each group with the number of responses that are done.
    Raises:
        Stopped: between two groups; no result is kept.
    """
    engine, objective, known = method.engine, method.objective, method.known
    # Terms are counted group by group, because a pair's number is unique only within a group.
    terms = sum((Counter(count_terms(objective, group.responses)) for group in groups), Counter())
    done: list[list[Forwarded]] = []
    num_done = 0
    with engine.evaluating(), known.all_or_nothing():
        for group in groups:
            stop.check()
            of_group = forward(method, group, with_statistics=True)
            done.append([replace(part, batch=_without_tokens(part.batch)) for part in of_group])
            known.learn(engine, group)
            num_done += len(group.responses)
            on_done(num_done)
    parts = _with_baselines(method, groups, list(chain.from_iterable(done)), shift)
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64, device=engine.device)
    for part in parts:
        share, own_sums = micro_batch_loss(objective, part.batch, terms, part.logps, part.baselines)
        loss += share
        sums += own_sums
    tables: list[np.ndarray] = []
    origins: list[str] = []
    left = iter(parts)
    for of_group in done:
        own = [response.origin for part in of_group for response in part.batch.responses]
        rows = rows_of(objective, list(islice(left, len(of_group))))
        of_ranks, names = zip(*engine.gather_over_data((rows, own)), strict=True)
        tables.append(np.concatenate(of_ranks))
        origins += chain.from_iterable(names)
    table = _with_distinct_pairs(tables)
    metrics = step_metrics(objective, float(engine.sum_over_ranks(loss)), engine.sum_over_ranks(sums), table)
    if not any(terms.values()):
        del metrics["loss"]
    return Evaluation({f"held_out/{name}": value for name, value in metrics.items()}, table, origins)


def _with_baselines(method: Method, groups: Seq[Step], parts: Seq[Forwarded], shift: float) -> list[Forwarded]:
    """The forwarded micro-batches of all groups, each with what its rewards are compared with."""
    objective = method.objective
    # Answers to one prompt may be in several groups of the data, so they are compared after all of them are forwarded.
    whole = Step(0, tuple(sequence for group in groups for sequence in group.sequences))
    found = groups_of(objective, whole)
    means = means_of(method, found, range(len(found.found)), whole, parts) if found.found else {}
    compared = compared_on_device(method, StepShift(shift, found, means), [part.batch for part in parts])
    return [
        replace(part, baselines=baselines_of(objective, part.batch, part.logps, of_batch))
        for part, of_batch in zip(parts, compared, strict=True)
    ]


def _without_tokens(batch: MicroBatch) -> MicroBatch:
    """A micro-batch without its tokens, which losses and metrics do not read.

    The micro-batches of all groups are kept until the end, and their tokens need not stay on the device.
    """
    none, on_host = batch.token_ids_T[:0].clone(), np.zeros(0, dtype=np.int64)
    return replace(
        batch,
        token_ids_T=none,
        position_ids_T=none,
        predictors_N=none,
        host_predictors_N=on_host,
        targets_N=none,
        response_of_N=none,
    )


def _with_distinct_pairs(tables: Seq[np.ndarray]) -> np.ndarray:
    """Join the tables of all groups; pairs are renumbered, because their numbers are unique only within a group."""
    first = 0
    for rows in tables:
        paired = rows["pair"] >= 0
        rows["pair"][paired] += first
        first = max(first, rows["pair"].max(initial=-1) + 1)
    return np.concatenate(tables)
