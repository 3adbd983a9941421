"""The training loop: the order of steps, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from uft_ds.checkpoint.state import Position, TrainerState
from uft_ds.checkpoint.writer import CheckpointWriter
from uft_ds.data.mixture import Step
from uft_ds.data.prompts import by_prompt, tokens_of
from uft_ds.data.source import StepSource
from uft_ds.errors import CheckFailed, Stopped, UserError
from uft_ds.host.signals import NEVER, Stop
from uft_ds.objectives.objective import objective_at
from uft_ds.recipe.best import is_of_task
from uft_ds.recipe.names import unknown_name
from uft_ds.recipe.settings import TrainSettings
from uft_ds.record.lines_of_steps import write_step
from uft_ds.record.metrics import model_flops_utilization, peak_memory_gib
from uft_ds.record.report import Reporter
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.samples import Sample
from uft_ds.record.task_answers import TaskAnswer
from uft_ds.record.telemetry import write_rows
from uft_ds.streams.policy import Policy
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method
from uft_ds.training.samples import Sampler, sample
from uft_ds.training.schedule import learning_rate, progress_of_step
from uft_ds.training.step import run_step

START = TrainerState(step=0, skipped_steps=0)
"""The state of a run before its first step."""


class Tasks(Protocol):
    """Prompts that the policy answers at each evaluation, and that are graded; see `rollouts.tasks`."""

    @property
    def num_prompts(self) -> int: ...

    def evaluate(self, step: int, on_done: Callable[[int], None]) -> tuple[dict[str, float], list[TaskAnswer]]:
        """Metrics, named `tasks/...`, and all answers. Every rank must call it, and all get the same."""
        ...


@dataclass(frozen=True)
class Session:
    """Everything that a run trains with; created once, and the same for all steps.

    method: with the recipe's objective, before any schedule of beta.
    sampler: of the answers after each evaluation; None: there are none. tasks: likewise.
    starts_as_reference: whether policy and reference compute the same before the first update.
    """

    method: Method
    policy: Policy
    settings: TrainSettings
    folder: RunFolder
    reporter: Reporter
    checkpoints: CheckpointWriter
    stop: Stop = NEVER
    sampler: Sampler | None = None
    starts_as_reference: bool = True
    tasks: Tasks | None = None

    def method_at(self, progress: float, state: TrainerState) -> Method:
        """The method after `state`, with the objective at a point of the run: 0 at the first step, 1 at the last."""
        return replace(
            self.method,
            objective=objective_at(self.method.objective, progress),
            policy_is_reference=self.starts_as_reference and state.updates == 0,
        )


def train(session: Session, steps: StepSource, held_out: Seq[Step], state: TrainerState = START) -> TrainerState:
    """Run the steps after `state`; evaluate and save checkpoints periodically and at the end.

    The state is copied for a step's checkpoint before the step's evaluation, so a run that resumes from it evaluates
    first.

    Args:
        steps: a source that is restored to `state.source`.
        held_out: the groups of held-out data; may be empty.
    Returns:
        the state after the last step.
    Raises:
        CheckFailed: more steps than allowed had a non-finite loss or gradient.
        UserError: the last checkpoint could not be written.
        Stopped: the run was asked to stop; its last finished step is saved.
    """
    settings, checkpoints = session.settings, session.checkpoints
    if state.step == 0:
        # This checkpoint records the reference log-probs known at the start, so that every restart knows the same. It
        # also reveals a full disk at once.
        _checkpoint(session, state)
    saved = state.step
    try:
        if state.step in (0, len(steps)) or due(state.step, settings.evaluate_every) or steps.ended:
            # The evaluation after step n uses the beta of step n, also in a resumed run.
            before = session.method_at(progress_of_step(max(0, state.step - 1), len(steps)), state)
            _evaluate_and_report(session, before, held_out, state)
        while state.step < len(steps) and not steps.ended:
            step, saved = _next_step(session, steps, state, saved)
            if step.made:  # it took its time, in which the last checkpoint may have been written
                checkpoints.poll()
            started = time.perf_counter()
            rate = learning_rate(
                step.index, num_steps=len(steps), peak=settings.lr, warmup=settings.warmup, schedule=settings.schedule
            )
            progress = progress_of_step(step.index, len(steps))
            current = session.method_at(progress, state)
            result, metrics, shift, answers = run_step(current, step, rate, state.log_ratio_shift)
            metrics |= {**step.made, **steps.accept(step.index, answers)}
            state = TrainerState(state.step + 1, state.skipped_steps + result.skipped, shift, steps.state())
            seconds = time.perf_counter() - started
            session.reporter.step(state.step, metrics | _speed(session, step, seconds, metrics) | {"lr": rate})
            checkpoints.poll()
            if result.skipped:
                _account_for_skip(session, state, step)
            # A stop takes effect only after a finished step, which the handler below saves.
            session.stop.check()
            is_last = state.step == len(steps) or bool(steps.ended)
            if due(state.step, settings.checkpoint_every) or is_last:
                saved = _checkpoint(session, state)
                _store(session)
            if due(state.step, settings.evaluate_every) or is_last:
                _evaluate_and_report(session, session.method_at(progress, state), held_out, state)
    except Stopped as asked:
        if saved != state.step:
            _checkpoint(session, state)
        checkpoints.finish()
        _store(session)
        done = f"after step {state.step} of {len(steps)}, which is saved" if state.step else "before the first step"
        message = f"{asked} {done}: continue with --resume"
        raise Stopped(message, by_all=True) from None
    except CheckFailed as error:
        if error.by_all:  # the step is not to be trusted, but a checkpoint before it may still be being written
            checkpoints.finish()
        raise
    checkpoints.finish()
    _store(session)
    if steps.ended:
        session.reporter.say(f"ended after step {state.step} of {len(steps)}: {steps.ended}")
    return state


def _next_step(session: Session, steps: StepSource, state: TrainerState, saved: int) -> tuple[Step, int]:
    """The step after `state`, and the step that is saved. A source that fails costs nothing that has been trained.

    Raises:
        UserError, CheckFailed: as the source raises them, on every rank; the last finished step is saved then.
        Stopped: the run was asked to stop.
    """
    try:
        return steps.step(state.step), saved
    except (UserError, CheckFailed) as error:
        if not error.by_all:
            raise  # the other ranks may be in the next collective already, so none may begin here
        if saved != state.step:
            saved = _checkpoint(session, state)
        session.checkpoints.finish()
        _store(session)
        raise type(error)(f"{error} (step {saved} is saved: continue with --resume)") from None


def due(step: int, every: int) -> bool:
    """Whether work that is done every `every` steps is due after this step."""
    return step % every == 0


def _evaluate_and_report(session: Session, method: Method, held_out: Seq[Step], state: TrainerState) -> None:
    if session.tasks is not None:
        _evaluate_tasks(session, session.tasks, state.step)
    if not held_out:
        return
    reporter, count = session.reporter, sum(len(group.responses) for group in held_out)
    with reporter.working(f"evaluating held-out data after step {state.step}", count) as on_done:
        found = evaluate(method, held_out, state.log_ratio_shift, session.stop, on_done)
    wanted = session.settings.keep_best
    if wanted is not None and not is_of_task(wanted) and wanted not in found.metrics:
        known = tuple(found.metrics)
        raise UserError(f"train.keep_best: {unknown_name(wanted, known)}")
    reporter.held_out(state.step, found.metrics)
    if method.engine.rank == 0:
        write_rows(session.folder.held_out_rows, found.rows, found.origins)
    if session.sampler is not None:
        _sample(session, session.sampler, state.step)


def _evaluate_tasks(session: Session, tasks: Tasks, step: int) -> None:
    reporter = session.reporter
    with reporter.working(f"answering the prompts of tasks after step {step}", tasks.num_prompts) as on_done:
        metrics, answers = tasks.evaluate(step, on_done)
    reporter.tasks(step, metrics)
    unscored = [answer for answer in answers if answer.score is None]
    if unscored:
        first = unscored[0]
        reporter.warn(
            f"tasks, step {step}: {len(unscored)} of {len(answers)} answers have no score and count for nothing; the "
            f"first: {first.origin} of {first.task}: {first.reason}"
        )
    if session.method.engine.rank == 0:
        write_step(session.folder.task_answers, step, answers, TaskAnswer)


def _sample(session: Session, sampler: Sampler, step: int) -> None:
    engine = session.method.engine
    with session.reporter.working(f"answering held-out prompts after step {step}", len(sampler.prompts)) as on_done:
        samples = sample(engine, sampler, step, session.stop, on_done)
    if engine.rank == 0:
        write_step(session.folder.samples, step, samples, Sample)


def _checkpoint(session: Session, state: TrainerState) -> int:
    """Start a checkpoint of `state`; returns the step that is saved once its files are written."""
    started = time.perf_counter()
    position = Position(state, session.reporter.metrics_bytes)
    of_metrics = time.perf_counter() - started
    session.reporter.checkpoint(state.step, of_metrics + session.checkpoints.start(position, session.method.known))
    return state.step


def _store(session: Session) -> None:
    problem = session.method.known.flush()
    if problem is not None:
        session.reporter.warn(f"{problem}; the run continues without storing log-probs for other runs")


def _account_for_skip(session: Session, state: TrainerState, step: Step) -> None:
    allowed = session.settings.max_skipped_steps
    origins = ", ".join(response.origin for response in step.responses)
    session.reporter.warn(f"step {state.step} skipped: its loss or gradient is not finite; its responses: {origins}")
    if state.skipped_steps > allowed:
        session.checkpoints.poll(wait=True)  # let a checkpoint that is being written finish before the run ends
        raise CheckFailed(
            f"{state.skipped_steps} steps had a non-finite loss or gradient, train.max_skipped_steps allows {allowed}; "
            "the log names their responses"
        )


def _speed(session: Session, step: Step, seconds: float, metrics: Mapping[str, float]) -> dict[str, float]:
    engine = session.method.engine
    num_tokens = sum(sequence.num_tokens for sequence in step.sequences)
    speed = {
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "examples_per_second": len(step.responses) / seconds,
        "memory/peak_gib": engine.max_over_ranks(peak_memory_gib()),
    }
    # A prompt that is divided over micro-batches is forwarded in each: then a little more is computed than counts here.
    num_forwarded = tokens_of(step.sequences, by_prompt(step.sequences) if engine.shares_prompts else ())
    utilization = model_flops_utilization(
        session.policy,
        num_forwarded / seconds / engine.world_size,
        reference_share=metrics["reference/computed"] / len(step.responses),
    )
    return speed if utilization is None else speed | {"mfu": utilization}
