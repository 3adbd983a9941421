"""What the loop says of a step before it runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from toy import UFT

from uft_ds.checkpoint.state import TrainerState
from uft_ds.data.mixture import Step
from uft_ds.known.cache import Known
from uft_ds.objectives.objective import Objective
from uft_ds.training.forwarding import Method
from uft_ds.training.loop import Session, train

NOTHING: Any = None
"""Stands for what is not looked at."""


@pytest.mark.parametrize(
    ("step", "skipped", "starts_as_reference", "expected"),
    [(0, 0, True, True), (2, 2, True, True), (2, 1, True, False), (1, 0, True, False), (0, 0, False, False)],
)
def test_the_policy_is_the_reference_until_the_first_update(
    step: int, skipped: int, starts_as_reference: bool, expected: bool
) -> None:
    """A skipped step updates nothing; a policy that starts from an adapter of its own is not the reference."""
    method = Method(NOTHING, UFT, Known.of_reference("cached"), 64)
    session = Session(method, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, starts_as_reference=starts_as_reference)
    found = session.method_at(0.0, TrainerState(step, skipped))
    assert found.policy_is_reference == expected


class Stopping(Exception):
    """Ends the loop at the first forward."""


class OneStep:
    """A source whose step is this one."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __len__(self) -> int:
        return 9

    def step(self, n: int) -> Step:
        assert n == self._step.index
        return self._step


class Warned:
    """A reporter that keeps what it is warned of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    ("index", "score", "objective", "is_told"),
    [
        (0, 0.3, UFT, True),
        (0, 0.7, UFT, False),
        (0, 0.3, replace(UFT, center="prompt"), False),
        (0, None, UFT, False),
        (1, 0.3, UFT, False),
    ],
)
def test_a_policy_that_cannot_meet_its_scores_is_told_before_the_first_step(
    index: int, score: float | None, objective: Objective, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and only if the scores of its own answers are low and nothing centres them."""

    def stop(*_: Any) -> Any:
        raise Stopping

    monkeypatch.setattr("uft_ds.training.loop.run_step", stop)
    monkeypatch.setattr("uft_ds.training.loop._checkpoint", lambda *_: 0)
    method, reporter = Method(NOTHING, objective, Known.of_reference("lockstep"), 64), Warned()
    settings: Any = SimpleNamespace(evaluate_every=5, lr=1e-3, warmup=0.0, schedule="constant")
    made = {} if score is None else {"rollouts/score": score}
    source: Any = OneStep(Step(index, (), made))
    spoken: Any = reporter
    session = Session(method, NOTHING, settings, NOTHING, spoken, NOTHING)
    with pytest.raises(Stopping):
        train(session, source, [], TrainerState(index, 0))
    assert len(reporter.texts) == int(is_told)
    assert all("scores of 0.30 on average" in text for text in reporter.texts)
