"""More or fewer steps for a run that has begun: what may change, and what its remaining steps are then.

The steps that are done stay as they are. The remaining ones are those of a run that had the new number of steps from
its start: the same data, and learning rate and beta of the schedules over all of the new steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from uft_ds.checkpoint.state import Position
from uft_ds.data.mixture import SHORT_AFTER, Steps
from uft_ds.data.sources import PreparedData
from uft_ds.errors import UserError
from uft_ds.objectives.objective import objective_at
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed
from uft_ds.training.schedule import learning_rate, progress_of_step
from uft_ds.training.steps import steps_of

GROWS = ("train.steps", "train.epochs")
"""Keys that decide the number of steps. A resumed run may change them as far as `with_other_steps` allows."""


_ANEW = "start a run anew, or one from this run's adapter by start.adapter"


def may_grow(key: str) -> bool:
    """Whether this key decides the number of steps."""
    return key in GROWS


def with_other_steps(
    settings: Settings, data: PreparedData, position: Position, changes: Mapping[str, tuple[Any, Any]]
) -> tuple[Position, tuple[str, ...]]:
    """The position from which a run goes on with another number of steps, and what the user should know.

    Args:
        settings: as they are now.
        changes: (value then, value now) of each key of the recipe that has changed.
    Raises:
        UserError: a step that is done would not be a step of the longer or shorter run.
    """
    given = {key: values for key, values in changes.items() if may_grow(key)}
    if not given:
        return position, ()
    then = changed(settings, {key: before for key, (before, _) in given.items()})
    state, done = position.state, position.state.step
    before, after = steps_of(then, data, state.source), steps_of(settings, data, state.source)
    keys = ", ".join(f"{key}: {now} now, {past} before" for key, (past, now) in given.items())
    if done > len(after):
        again = " ".join(f"{key}={past}" for key, (past, _) in given.items())
        raise UserError(
            f"{keys}: that is {len(after):,} steps, and {done:,} are done; expected at least {done:,} "
            f"(a value that was given on the command line is given again: {again}; uft convert takes an earlier "
            "checkpoint)"
        )
    _check_no_schedule_of_shares(settings, done, keys)
    notes = [f"{keys}: {len(after):,} steps, {done:,} of them done"]
    if before.starts(done) != after.starts(done):
        state, after = _after_a_short_step(settings, then, data, position, keys)
        notes.append(
            f"step {done} was the last of {then.train.epochs} epoch{'s' * (then.train.epochs > 1)} and held what "
            f"remained; the next epoch begins with step {done + 1}, {len(after):,} steps in all"
        )
    notes += _of_schedules(settings, len(before), len(after), done)
    return replace(position, state=state), tuple(notes)


def _check_no_schedule_of_shares(settings: Settings, done: int, keys: str) -> None:
    for number, source in enumerate(settings.data.sources):
        if done and len(source.portion.share or ()) > 1:
            raise UserError(
                f"{keys}: data.sources.{number}.share is a schedule over the whole run, so the steps that are done "
                f"would have held other data; {_ANEW}"
            )


def _after_a_short_step(
    settings: Settings, then: Settings, data: PreparedData, position: Position, keys: str
) -> tuple[Any, Steps]:
    """The state and the steps of a run whose last step held what remained of its epochs."""
    state = position.state
    short = sorted({*state.source.get(SHORT_AFTER, ()), then.train.epochs})
    source = {**state.source, SHORT_AFTER: short}
    before, after = steps_of(then, data, state.source), steps_of(settings, data, source)
    if then.train.steps is not None or before.starts(state.step) != after.starts(state.step):
        raise UserError(f"{keys}: the {state.step:,} steps that are done would have held other data; {_ANEW}")
    return replace(state, source=source), after


def _of_schedules(settings: Settings, before: int, after: int, done: int) -> list[str]:
    """What the learning rate and beta of the remaining steps are, compared with those of the steps that are done."""
    if done == after or before == after:
        return []
    train = settings.train

    def rate(step: int, num_steps: int) -> float:
        return learning_rate(step, num_steps=num_steps, peak=train.lr, warmup=train.warmup, schedule=train.schedule)

    next_rate = f"learning rate {rate(done, after):.3g} at step {done + 1:,}"
    last = f", {rate(done - 1, before):.3g} at step {done:,}" if done else ""
    same_rates = all(rate(step, before) == rate(step, after) for step in range(done))
    same_betas = all(
        objective_at(settings.objective, progress_of_step(step, before))
        == objective_at(settings.objective, progress_of_step(step, after))
        for step in range(done)
    )
    schedule = f"train.schedule {train.schedule}, train.warmup {train.warmup:g}"
    if same_rates and same_betas:
        return [f"{schedule}: every step so far is also that of a run of {after:,} steps; {next_rate}{last}"]
    what = " and ".join(
        name
        for name, is_same in (("the learning rate", same_rates), ("beta (objective.beta_schedule)", same_betas))
        if not is_same
    )
    return [
        f"note: {schedule}: {what} of the remaining steps follow{'s' * (same_rates or same_betas)} the schedule over "
        f"{after:,} steps; the steps so far had that over {before:,}: {next_rate}{last}"
    ]
