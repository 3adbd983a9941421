"""One optimiser step over all ranks.

forward both streams -> log-ratios -> objective -> backward -> step      UFT (arXiv 2410.21438) Eq. 5-7
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine, StepResult
from uft_ds.errors import CheckFailed
from uft_ds.known.cache import ReferenceCache
from uft_ds.objectives.implicit_reward import logps_of, response_sums
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import Objective, count_terms, log_ratios_of, micro_batch_loss
from uft_ds.objectives.reward_shift import (
    kl_shift,
    mismatched,
    next_running_mean,
    prompt_of,
    repeated_prompts,
)
from uft_ds.record.metrics import step_metrics
from uft_ds.record.telemetry import response_rows
from uft_ds.streams.stream import Output, Stream


@dataclass(frozen=True)
class Forwarded:
    """What is kept of a micro-batch, without its graph: [responses] each, float64, summed over tokens.

    logps: by stream, nats. entropy_R: of the policy, nats. top1_R: tokens that are the policy's most probable ones.
    """

    batch: MicroBatch
    logps: Mapping[str, Tensor]
    entropy_R: Tensor | None = None
    top1_R: Tensor | None = None

    @classmethod
    def of(cls, batch: MicroBatch, logps: Mapping[str, Tensor], policy: Output) -> Forwarded:
        """Args: logps: by stream, with or without a graph. policy: of the same forward."""
        assert policy.entropy_N is not None
        assert policy.is_top1_N is not None
        return cls(
            batch,
            {name: logps_R.detach() for name, logps_R in logps.items()},
            *(response_sums(of_N, batch) for of_N in (policy.entropy_N, policy.is_top1_N)),
        )


class StepOutcome(NamedTuple):
    """shift: what the reward shift goes on with, nats: the running mean, or the last step's."""

    result: StepResult
    metrics: dict[str, float]
    shift: float


def run_step(
    engine: Engine,
    objective: Objective,
    step: Step,
    rate: float,
    tokens_per_micro_batch: int,
    reference: ReferenceCache,
    shift: float = 0.0,
) -> StepOutcome:
    """One optimiser step, and its metrics: over the responses of the whole step.

    Args:
        shift: what the step before went on with, nats.
    """
    num_terms = count_terms(objective, step.responses)
    before = shift
    if objective.shift.name == "kl":
        shift = _kl_of(engine, objective, step, tokens_per_micro_batch)
    ahead: list[Forwarded] = []
    if objective.shift.name == "prompt_mean":
        # A response's shift depends on log-ratios of the whole step, for which no backward can wait.
        shared = _of_repeated_prompts(objective, step)
        with engine.evaluating():
            ahead = forward(engine, reference.micro_batches(engine, shared, tokens_per_micro_batch), reference)
    micro_batches = reference.micro_batches(engine, step, tokens_per_micro_batch)
    shifts = shifts_of(engine, objective, step, [batch for batch, _ in micro_batches], ahead, shift)
    total_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64, device=engine.device)
    done: list[Forwarded] = []
    for number, ((batch, forward_reference), shifts_R) in enumerate(zip(micro_batches, shifts, strict=True), start=1):
        outputs = engine(batch, streams_of(engine, with_reference=forward_reference))
        logps = _with_known(reference, batch, logps_of(outputs, batch))
        loss, parts = micro_batch_loss(objective, batch, num_terms, logps, shifts_R)
        engine.backward(loss, is_last=number == len(micro_batches))
        total_loss += loss.detach()
        sums += parts
        done.append(Forwarded.of(batch, logps, outputs["policy"]))
    computed = reference.learn(engine, step)
    result = engine.step(rate)
    mean_loss = float(engine.sum_over_ranks(total_loss))
    if not math.isfinite(mean_loss) and not result.skipped:
        raise CheckFailed(
            f"step {step.index + 1}: the loss is {mean_loss}, yet its gradient was finite and was applied"
        )
    rows = np.concatenate(engine.gather_objects(rows_of(objective, done, shifts)))
    metrics = step_metrics(objective, mean_loss, engine.sum_over_ranks(sums), rows)
    metrics |= {"grad_norm": result.grad_norm, "skipped": float(result.skipped), "reference/computed": float(computed)}
    moved = rows["shift"][_is_pointwise(objective, rows)]
    if objective.shift.name != "none" and len(moved):
        metrics["reward_shift"] = float(moved.mean())
    return StepOutcome(result, metrics, before if result.skipped else _next_shift(objective, rows, before, shift))


def streams_of(engine: Engine, *, with_reference: bool) -> tuple[Stream, ...]:
    """What a training step forwards."""
    names = ("policy", "reference") if with_reference else ("policy",)
    return tuple(engine.streams[name] for name in names)


def _with_known(reference: ReferenceCache, batch: MicroBatch, logps: dict[str, Tensor]) -> dict[str, Tensor]:
    """The log-probs as forwarded, and the reference's as known where it was not."""
    reference_logps_R = reference.resolve(batch, logps.get("reference"))
    return logps if reference_logps_R is None else logps | {"reference": reference_logps_R}


def forward(engine: Engine, micro_batches: Seq[tuple[MicroBatch, bool]], reference: ReferenceCache) -> list[Forwarded]:
    """Log-probs of micro-batches, within `engine.evaluating()`."""
    done = []
    for batch, forward_reference in micro_batches:
        outputs = engine(batch, streams_of(engine, with_reference=forward_reference))
        logps = _with_known(reference, batch, logps_of(outputs, batch))
        done.append(Forwarded.of(batch, logps, outputs["policy"]))
    return done


def shifts_of(
    engine: Engine,
    objective: Objective,
    step: Step,
    batches: Seq[MicroBatch],
    forwarded: Seq[Forwarded],
    shift: float,
) -> list[Tensor | None]:
    """What is subtracted from the rewards of each micro-batch: [responses], float32; None: nothing.

    Args:
        forwarded: log-probs of the responses to repeated prompts at least, for `prompt_mean`.
        shift: this step's, nats, for `ema` and `kl`.
    """
    name = objective.shift.name
    if name == "none":
        return [None for _ in batches]
    means = _prompt_means(engine, objective, step, forwarded) if name == "prompt_mean" else {}

    def shift_of(key: bytes, response: Response) -> float:
        if not objective.has_pointwise(response.kind):
            return 0.0
        if name == "constant":
            return objective.shift.value
        nats = means.get((key, response.kind), 0.0) if name == "prompt_mean" else shift
        return objective.of_kind[response.kind].beta * nats

    return [
        torch.tensor(list(map(shift_of, batch.response_keys, batch.responses)), dtype=torch.float32).to(
            engine.device, non_blocking=True
        )
        for batch in batches
    ]


def rows_of(objective: Objective, done: Seq[Forwarded], shifts: Seq[Tensor | None]) -> np.ndarray:
    """The table of this rank's responses."""
    return np.concatenate(
        [
            response_rows(
                objective,
                part.batch,
                part.logps["policy"],
                part.logps.get("reference"),
                shifts_R,
                entropy_R=part.entropy_R,
                top1_R=part.top1_R,
            )
            for part, shifts_R in zip(done, shifts, strict=True)
        ]
    )


def _of_repeated_prompts(objective: Objective, step: Step) -> Step:
    """The units whose shift is not 0 under `prompt_mean`."""
    repeated = _repeated(objective, step)
    kept = (
        unit
        for unit in step.units
        if any(prompt_of(sequence, response) in repeated for sequence in unit for response in sequence.responses)
    )
    return Step(step.index, tuple(sequence for unit in kept for sequence in unit))


def _repeated(objective: Objective, step: Step) -> set[bytes]:
    spans = _pointwise_spans(objective, step)
    prompts = [prompt_of(sequence, response) for sequence, response, _ in spans]
    return repeated_prompts(prompts, [key for *_, key in spans])


def _prompt_means(
    engine: Engine, objective: Objective, step: Step, forwarded: Seq[Forwarded]
) -> dict[tuple[bytes, Kind], float]:
    """The mean log-ratio of the responses to each repeated prompt, by the response's name and kind, nats."""
    own: dict[tuple[bytes, Kind], float] = {}
    for part in forwarded:
        if "reference" in part.logps:
            log_ratios_R = log_ratios_of(objective, part.batch, part.logps["policy"], part.logps["reference"])
            names = zip(part.batch.response_keys, (r.kind for r in part.batch.responses), strict=True)
            own |= dict(zip(names, log_ratios_R.tolist(), strict=True))
    log_ratios = {name: ratio for of_rank in engine.gather_objects(own) for name, ratio in of_rank.items()}
    repeated = _repeated(objective, step)
    members: dict[bytes, list[tuple[bytes, Kind]]] = {}
    for sequence, response, key in _pointwise_spans(objective, step):
        prompt = prompt_of(sequence, response)
        if prompt in repeated:
            members.setdefault(prompt, []).append((key, response.kind))
    means = {prompt: float(np.mean([log_ratios[name] for name in names])) for prompt, names in members.items()}
    return {name: means[prompt] for prompt, names in members.items() for name in names}


def _kl_of(engine: Engine, objective: Objective, step: Step, tokens_per_micro_batch: int) -> float:
    """KTO's reference point, of mismatched prompts and responses of this step: both streams, no gradient; nats."""
    spans = [(sequence, response) for sequence, response, _ in _pointwise_spans(objective, step)]
    joined = Step(step.index, mismatched(spans))
    if not joined.sequences:
        return 0.0
    own: list[float] = []
    with engine.evaluating():
        for batch in engine.micro_batches(joined, tokens_per_micro_batch):
            logps = logps_of(engine(batch, streams_of(engine, with_reference=True)), batch)
            own += log_ratios_of(objective, batch, logps["policy"], logps["reference"]).tolist()
    # Sorted, so that the sum does not depend on which rank held what.
    return kl_shift(sorted(ratio for of_rank in engine.gather_objects(own) for ratio in of_rank))


def _pointwise_spans(objective: Objective, step: Step) -> list[tuple[Sequence, Response, bytes]]:
    """Each response that meets its score, with its sequence and its name, in the order of the step."""
    return [
        (sequence, response, key)
        for sequence in step.sequences
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
        if objective.has_pointwise(response.kind)
    ]


def _next_shift(objective: Objective, rows: np.ndarray, before: float, shift: float) -> float:
    """What is not finite is not kept: neither in the running mean nor for the held-out data."""
    if objective.shift.name != "ema":
        return shift if math.isfinite(shift) else before
    pointwise = rows[_is_pointwise(objective, rows)]
    betas = np.array([objective.of_kind[kind].beta for kind in KINDS])
    log_ratios = np.sort(pointwise["reward"] / betas[pointwise["kind"]])
    if not len(log_ratios) or not np.isfinite(log_ratios).all():
        return shift
    return next_running_mean(shift, float(log_ratios.mean()), objective.shift.decay)


def _is_pointwise(objective: Objective, rows: np.ndarray) -> np.ndarray:
    return np.isin(rows["kind"], [code for code, kind in enumerate(KINDS) if objective.has_pointwise(kind)])
