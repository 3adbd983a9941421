"""The training loop: steps, evaluations and checkpoints in their order."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from peft import PeftModel

from uft_ds.checkpoint.state import Position, TrainerState
from uft_ds.checkpoint.writer import CheckpointWriter
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed, Stopped, UserError
from uft_ds.host.signals import NEVER, Stop
from uft_ds.known.cache import ReferenceCache
from uft_ds.objectives.objective import Objective, objective_at
from uft_ds.recipe.names import unknown_name
from uft_ds.recipe.settings import TrainSettings
from uft_ds.record.metrics import model_flops_utilization, peak_memory_gib
from uft_ds.record.report import Reporter
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.telemetry import write_rows
from uft_ds.training.evaluate import evaluate
from uft_ds.training.schedule import learning_rate
from uft_ds.training.step import run_step

START = TrainerState(step=0, skipped_steps=0)


def train(
    engine: Engine,
    policy: PeftModel,
    steps: Seq[Step],
    held_out: Seq[Step],
    objective: Objective,
    settings: TrainSettings,
    folder: RunFolder,
    reporter: Reporter,
    reference: ReferenceCache,
    checkpoints: CheckpointWriter,
    state: TrainerState = START,
    stop: Stop = NEVER,
) -> TrainerState:
    """Run the steps that `state` has not seen; evaluate and save on the way and at the end.

    A step's checkpoint is copied before its evaluation: a run that goes on from it evaluates first.

    Raises:
        CheckFailed: more steps than allowed had a non-finite loss or gradient.
        UserError: the last checkpoint could not be written.
        Stopped: the run was asked to stop; its last finished step is saved.
    """
    if state.step == 0:
        # What is known of the reference at the start is known to every restart; and a full disk shows at once.
        _checkpoint(checkpoints, state, reference, reporter)
    saved = state.step
    try:
        if state.step == 0 or due(state.step, settings.evaluate_every) or state.step == len(steps):
            before = objective_at(objective, max(0, state.step - 1) / max(1, len(steps) - 1))
            _evaluate_and_report(engine, before, held_out, settings, folder, reporter, reference, state, stop)
        for number in range(state.step, len(steps)):
            step = steps[number]
            started = time.perf_counter()
            rate = learning_rate(
                step.index, num_steps=len(steps), peak=settings.lr, warmup=settings.warmup, schedule=settings.schedule
            )
            current = objective_at(objective, step.index / max(1, len(steps) - 1))
            result, metrics, shift = run_step(
                engine, current, step, rate, settings.tokens_per_micro_batch, reference, state.log_ratio_shift
            )
            state = TrainerState(state.step + 1, state.skipped_steps + result.skipped, shift)
            seconds = time.perf_counter() - started
            reporter.step(state.step, metrics | _speed(engine, policy, step, seconds, metrics) | {"lr": rate})
            checkpoints.poll()
            if result.skipped:
                _account_for_skip(state, step, settings.max_skipped_steps, reporter, checkpoints)
            stop.check()
            is_last = state.step == len(steps)
            if due(state.step, settings.checkpoint_every) or is_last:
                saved = _checkpoint(checkpoints, state, reference, reporter)
                _store(reference, reporter)
            if due(state.step, settings.evaluate_every) or is_last:
                _evaluate_and_report(engine, current, held_out, settings, folder, reporter, reference, state, stop)
    except Stopped as asked:
        if saved != state.step:
            _checkpoint(checkpoints, state, reference, reporter)
        checkpoints.finish()
        _store(reference, reporter)
        message = f"{asked} after step {state.step} of {len(steps)}, which is saved: --resume goes on"
        raise Stopped(message, by_all=True) from None
    checkpoints.finish()
    _store(reference, reporter)
    return state


def due(step: int, every: int) -> bool:
    """Whether periodic work falls on this step."""
    return step % every == 0


def _evaluate_and_report(
    engine: Engine,
    objective: Objective,
    held_out: Seq[Step],
    settings: TrainSettings,
    folder: RunFolder,
    reporter: Reporter,
    reference: ReferenceCache,
    state: TrainerState,
    stop: Stop,
) -> None:
    if not held_out:
        return
    shift, tokens = state.log_ratio_shift, settings.tokens_per_micro_batch
    found = evaluate(engine, objective, held_out, tokens, reference, shift, stop)
    if settings.keep_best is not None and settings.keep_best not in found.metrics:
        known = tuple(found.metrics)
        raise UserError(f"train.keep_best: {unknown_name(settings.keep_best, known)}")
    reporter.held_out(state.step, found.metrics)
    if engine.rank == 0:
        write_rows(folder.held_out_rows, found.rows, found.origins)


def _checkpoint(
    checkpoints: CheckpointWriter, state: TrainerState, reference: ReferenceCache, reporter: Reporter
) -> int:
    """Returns the step that is saved, once it is written."""
    started = time.perf_counter()
    position = Position(state, reporter.metrics_bytes)
    of_metrics = time.perf_counter() - started
    reporter.checkpoint(state.step, of_metrics + checkpoints.start(position, reference))
    return state.step


def _store(reference: ReferenceCache, reporter: Reporter) -> None:
    problem = reference.flush()
    if problem is not None:
        reporter.warn(f"{problem}; the run goes on without storing for others")


def _account_for_skip(
    state: TrainerState, step: Step, allowed: int, reporter: Reporter, checkpoints: CheckpointWriter
) -> None:
    origins = ", ".join(response.origin for response in step.responses)
    reporter.warn(f"step {state.step} skipped: its gradient is not finite; its responses: {origins}")
    if state.skipped_steps > allowed:
        checkpoints.poll(wait=True)  # what is being written is worth keeping
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
