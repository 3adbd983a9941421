"""More or fewer steps for a run that has begun: which data, learning rates and betas its remaining steps have."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from checkpoints import whole_checkpoint
from sources import write_rows
from tiny import build_tiny_tokenizer

from uft_ds.checkpoint.state import Position, TrainerState, write_position
from uft_ds.data.mixture import Steps
from uft_ds.data.sources import PreparedData
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.growth import with_other_steps
from uft_ds.run.prepare import prepare_data
from uft_ds.run.resume import _go_back_to, resumed_position
from uft_ds.training.steps import steps_of

OF_EPOCH = 25
"""Rows of the source, in steps of 8: three steps and one row."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, PreparedData]:
    """A run of four steps on one source."""
    folder = tmp_path_factory.mktemp("growth")
    rows = [{"prompt": f"q {i}", "response": "a"} for i in range(OF_EPOCH)]
    source = {"format": "jsonl", "path": str(write_rows(folder / "rows.jsonl", rows))}
    data = {"sources": [source], "cache_dir": str(folder / "tokens"), "max_length": 64, "workers": 1}
    train = {"steps": 4, "examples_per_step": 8}
    tree = {"name": "x", "model": {"base": "b"}, "data": data, "output": "o", "train": train}
    settings = settings_of(recipe_from_tree(tree, "x"))
    chat = load_tokenizer(str(build_tiny_tokenizer(folder / "tokenizer")))
    return settings, prepare_data(settings, chat)


def grown(
    begun: tuple[Settings, PreparedData], done: int, then: dict[str, Any], now: dict[str, Any], source: Any = None
) -> tuple[Steps, Steps, tuple[str, ...], Position]:
    """The steps of the run as it was, and as it goes on after `done` steps; what is said, and from where it goes on."""
    settings, data = begun
    before, after = (changed(settings, {f"train.{key}": value for key, value in part.items()}) for part in (then, now))
    changes = {
        f"train.{key}": (then[key], now[key]) for key in ("steps", "epochs") if key in now and then[key] != now[key]
    }
    state = TrainerState(done, 0, source=source or {})
    position, said = with_other_steps(after, data, Position(state, 0), changes)
    return steps_of(before, data, state.source), steps_of(after, data, position.state.source), said, position


def rows_of(steps: Steps, first: int = 0, last: int | None = None) -> list[list[str]]:
    return [[response.origin for response in step.responses] for step in steps[first:last]]


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_grown_run_has_the_data_of_a_longer_one(begun: tuple[Settings, PreparedData], done: int) -> None:
    """Step by step, over the end of an epoch."""
    before, after, _, position = grown(begun, done, {"steps": 4}, {"steps": 9})
    straight = steps_of(changed(begun[0], {"train.steps": 9}), begun[1])
    assert rows_of(after) == rows_of(straight)
    assert rows_of(after, 0, 4) == rows_of(before)
    assert position.state.source == {}
    assert len(after) == 9


def test_epochs_after_a_short_step_begin_anew(begun: tuple[Settings, PreparedData]) -> None:
    """One epoch of 25 rows ends with a step of one row. Each further epoch has every row once."""
    before, after, said, position = grown(begun, 4, {"steps": None, "epochs": 1}, {"steps": None, "epochs": 2})
    assert [len(step.responses) for step in before] == [8, 8, 8, 1]
    assert rows_of(after, 0, 4) == rows_of(before)
    second = sorted(chain.from_iterable(rows_of(after, 4)))
    assert second == sorted(chain.from_iterable(rows_of(before)))
    assert any(
        "step 4 was the last of 1 epoch and held what remained; the next epoch begins with step 5" in t for t in said
    )
    assert position.state.source == {"short_after": [1]}
    after.restore(position.state.source)
    then, now = {"steps": None, "epochs": 2}, {"steps": None, "epochs": 3}
    _, third, _, position = grown(begun, 8, then, now, position.state.source)
    assert position.state.source == {"short_after": [1, 2]}
    assert rows_of(third, 0, 8) == rows_of(after)
    assert sorted(chain.from_iterable(rows_of(third, 8))) == second


def test_epochs_before_a_short_step_are_those_of_a_longer_run(begun: tuple[Settings, PreparedData]) -> None:
    """While the short step is not done, the next epoch fills it, as it would have."""
    _, after, _, position = grown(begun, 3, {"steps": None, "epochs": 1}, {"steps": None, "epochs": 2})
    straight = steps_of(changed(begun[0], {"train.steps": None, "train.epochs": 2}), begun[1])
    assert position.state.source == {}
    assert rows_of(after) == rows_of(straight)


def test_fewer_steps_than_are_done_are_refused(begun: tuple[Settings, PreparedData]) -> None:
    """Fewer than before, but not fewer than are done, are no problem."""
    with pytest.raises(UserError, match=r"train\.steps: 2 now, 4 before: that is 2 steps, and 3 are done"):
        grown(begun, 3, {"steps": 4}, {"steps": 2})
    assert len(grown(begun, 3, {"steps": 4}, {"steps": 3})[1]) == 3


def test_a_schedule_of_shares_is_refused(begun: tuple[Settings, PreparedData]) -> None:
    """It is stretched over the run, so other data would have been trained on; before the first step it may be."""
    settings = changed(begun[0], {"data.sources.0.share": [[0.0, 1.0], [1.0, 1.0]]})
    with pytest.raises(UserError, match=r"data\.sources\.0\.share is a schedule over the whole run"):
        grown((settings, begun[1]), 1, {"steps": 4}, {"steps": 5})
    assert grown((settings, begun[1]), 0, {"steps": 4}, {"steps": 5})[2]


@pytest.mark.parametrize(
    ("train", "objective", "expected"),
    [
        ({"schedule": "constant", "warmup": 0.0}, {}, "every step so far is also that of a run of 8 steps"),
        ({"schedule": "constant", "warmup": 0.5}, {}, "the learning rate of the remaining steps follows the schedule"),
        ({"schedule": "cosine", "warmup": 0.0}, {}, "learning rate 1.5e-05 at step 5, 4.39e-06 at step 4"),
        (
            {"schedule": "constant", "warmup": 0.0},
            {"beta_schedule": "linear", "beta_end": 2.0},
            "beta (objective.beta_schedule) of the remaining steps follows the schedule over 8 steps",
        ),
        (
            {"schedule": "linear", "warmup": 0.0},
            {"beta_schedule": "linear", "beta_end": 2.0},
            "the learning rate and beta (objective.beta_schedule) of the remaining steps follow the schedule",
        ),
    ],
)
def test_what_schedules_do_is_said(
    begun: tuple[Settings, PreparedData], train: dict[str, Any], objective: dict[str, Any], expected: str
) -> None:
    """3e-5 (1 + cos(pi / 2)) / 2 at the fifth of 8 steps; 3e-5 (1 + cos(3 pi / 4)) / 2 at the fourth of 4."""
    keys = {f"train.{key}": value for key, value in train.items()}
    keys |= {f"objective.{key}": value for key, value in objective.items()}
    settings = settings_of(recipe_from_tree(_tree_with(begun[0], keys), "x"))
    said = grown((settings, begun[1]), 4, {"steps": 4}, {"steps": 8})[2]
    assert said[0] == "train.steps: 8 now, 4 before: 8 steps, 4 of them done"
    assert expected in said[1], said


def _tree_with(settings: Settings, keys: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads(json.dumps(dict(settings.stored)))
    for key, value in keys.items():
        section, name = key.split(".")
        tree[section][name] = value
    return tree


def test_the_short_step_is_known_to_every_resume_until_a_checkpoint_holds_it(
    begun: tuple[Settings, PreparedData], tmp_path: Path
) -> None:
    """A run that is killed before its next checkpoint resumes from the same one, whose state says nothing of it."""
    folder = RunFolder(tmp_path)
    checkpoint, other = (whole_checkpoint(folder.checkpoints / f"step-00000{step}") for step in (4, 2))
    for path, step in ((checkpoint, 4), (other, 2)):
        write_position(path, Position(TrainerState(step, 0), 0))
    position = Position(TrainerState(4, 0, source={"short_after": [1]}), 0)
    _go_back_to(checkpoint, folder, changed(begun[0], {"output": str(tmp_path)}), position)
    assert json.loads(folder.resumed.read_text()) == {"checkpoint": "step-000004", "source": {"short_after": [1]}}
    assert resumed_position(folder, checkpoint).state.source == {"short_after": [1]}
    assert resumed_position(folder, other).state.source == {}
