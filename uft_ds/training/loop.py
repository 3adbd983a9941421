"""The training loop, read from top to bottom.

forward both streams -> log-ratios -> objective -> backward -> step      UFT (arXiv 2410.21438) Eq. 5-7
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from peft import PeftModel

from uft_ds.checkpoint.save import TrainerState, save_checkpoint
from uft_ds.data.example import KINDS
from uft_ds.data.mixture import Step
from uft_ds.errors import CheckFailed
from uft_ds.objectives.objective import STATISTICS, Objective, count_terms, micro_batch_loss
from uft_ds.recipe import TrainSection
from uft_ds.training.engine import Engine, StepResult
from uft_ds.training.evaluate import evaluate
from uft_ds.training.metrics import model_flops_utilization, peak_memory_gib, step_metrics
from uft_ds.training.reference_cache import ReferenceCache
from uft_ds.training.report import Reporter
from uft_ds.training.run_folder import RunFolder
from uft_ds.training.schedule import learning_rate

START = TrainerState(step=0, skipped_steps=0)


def train(
    engine: Engine,
    policy: PeftModel,
    steps: Seq[Step],
    held_out: Seq[Step],
    objective: Objective,
    settings: TrainSection,
    folder: RunFolder,
    reporter: Reporter,
    reference: ReferenceCache,
    state: TrainerState = START,
) -> TrainerState:
    """Run the steps that `state` has not seen; evaluate and save on the way and at the end.

    Raises:
        CheckFailed: more steps than allowed had a non-finite loss or gradient.
    """
    _evaluate_and_report(engine, objective, held_out, settings, reporter, reference, step=state.step)
    for number in range(state.step, len(steps)):
        step = steps[number]
        started = time.perf_counter()
        rate = learning_rate(
            step.index, num_steps=len(steps), peak=settings.lr, warmup=settings.warmup, schedule=settings.schedule
        )
        result, metrics = run_step(engine, objective, step, rate, settings.tokens_per_micro_batch, reference)
        state = TrainerState(state.step + 1, state.skipped_steps + result.skipped)
        if result.skipped:
            _account_for_skip(state, step, settings.max_skipped_steps, reporter)
        seconds = time.perf_counter() - started
        reporter.step(state.step, metrics | _speed(engine, policy, step, seconds, metrics) | {"lr": rate})
        is_last = state.step == len(steps)
        if due(state.step, settings.checkpoint_every) or is_last:
            save_checkpoint(engine, policy, folder, state, reference, keep=settings.keep_checkpoints)
            _store(reference, reporter)
        if due(state.step, settings.evaluate_every) or is_last:
            _evaluate_and_report(engine, objective, held_out, settings, reporter, reference, step=state.step)
    _store(reference, reporter)
    return state


def run_step(
    engine: Engine,
    objective: Objective,
    step: Step,
    rate: float,
    tokens_per_micro_batch: int,
    reference: ReferenceCache,
) -> tuple[StepResult, dict[str, float]]:
    """One optimiser step over all ranks, and its metrics: means over the responses of the whole step."""
    num_terms = count_terms(objective, step.responses)
    micro_batches = reference.micro_batches(engine, step, tokens_per_micro_batch)
    total_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    sums = torch.zeros(len(KINDS), len(STATISTICS), dtype=torch.float64, device=engine.device)
    for number, (micro_batch, forward_reference) in enumerate(micro_batches, start=1):
        logps_R, forwarded_R = engine(micro_batch, with_reference=forward_reference)
        reference_logps_R = reference.resolve(micro_batch, forwarded_R)
        loss, statistics = micro_batch_loss(objective, micro_batch, num_terms, logps_R, reference_logps_R)
        engine.backward(loss, is_last=number == len(micro_batches))
        total_loss += loss.detach()
        sums += statistics
    computed = reference.learn(engine, step)
    result = engine.step(rate)
    mean_loss = float(engine.sum_over_ranks(total_loss))
    if not math.isfinite(mean_loss) and not result.skipped:
        raise CheckFailed(
            f"step {step.index + 1}: the loss is {mean_loss}, yet its gradient was finite and was applied"
        )
    metrics = step_metrics(objective, mean_loss, engine.sum_over_ranks(sums))
    counts = {"skipped": float(result.skipped), "reference/computed": float(computed)}
    return result, metrics | {"grad_norm": result.grad_norm} | counts


def due(step: int, every: int) -> bool:
    """Whether periodic work falls on this step."""
    return step % every == 0


def _evaluate_and_report(
    engine: Engine,
    objective: Objective,
    held_out: Seq[Step],
    settings: TrainSection,
    reporter: Reporter,
    reference: ReferenceCache,
    *,
    step: int,
) -> None:
    if held_out:
        metrics = evaluate(engine, objective, held_out, settings.tokens_per_micro_batch, reference)
        reporter.held_out(step, metrics)


def _store(reference: ReferenceCache, reporter: Reporter) -> None:
    problem = reference.flush()
    if problem is not None:
        reporter.warn(f"{problem}; the run goes on without storing for others")


def _account_for_skip(state: TrainerState, step: Step, allowed: int, reporter: Reporter) -> None:
    origins = ", ".join(response.origin for response in step.responses)
    reporter.warn(f"step {state.step} skipped: its gradient is not finite; its responses: {origins}")
    if state.skipped_steps > allowed:
        raise CheckFailed(
            f"{state.skipped_steps} steps had a non-finite loss or gradient, train.max_skipped_steps allows {allowed}; "
            "the log names their responses"
        )


def _speed(
    engine: Engine, policy: PeftModel, step: Step, seconds: float, metrics: Mapping[str, float]
) -> dict[str, float]:
    num_tokens = sum(sequence.num_tokens for sequence in step.sequences)
    speed = {
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "examples_per_second": len(step.responses) / seconds,
        "memory/peak_gib": engine.max_over_ranks(peak_memory_gib()),
    }
    utilization = model_flops_utilization(
        policy,
        num_tokens / seconds / engine.world_size,
        reference_share=metrics["reference/computed"] / len(step.responses),
    )
    return speed if utilization is None else speed | {"mfu": utilization}
