"""trainer.json: what is written is what is read, and what is no such file is refused."""

import json
from pathlib import Path

import pytest

from uft_ds.checkpoint.state import Position, TrainerState, read_position, write_position
from uft_ds.errors import UserError


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every number, and whatever JSON values the source of steps has given."""
    position = Position(TrainerState(7, 1, 0.1 + 0.2, {"record": "steps.jsonl", "next": [3, None]}), 4096)
    write_position(tmp_path, position)
    assert read_position(tmp_path) == position


def test_a_state_without_a_source_is_that_of_fixed_data(tmp_path: Path) -> None:
    """Checkpoints that were written before sources had a state can be gone on from."""
    write_position(tmp_path, Position(TrainerState(7, 1, 0.5), 4096))
    content = json.loads((tmp_path / "trainer.json").read_text())
    del content["source"]
    (tmp_path / "trainer.json").write_text(json.dumps(content))
    assert read_position(tmp_path).state == TrainerState(7, 1, 0.5)


@pytest.mark.parametrize("source", [3, "text", [1]])
def test_a_source_that_is_no_object_is_refused(tmp_path: Path, source: object) -> None:
    """The message names the file."""
    write_position(tmp_path, Position(TrainerState(7, 1), 0))
    content = json.loads((tmp_path / "trainer.json").read_text())
    (tmp_path / "trainer.json").write_text(json.dumps(content | {"source": source}))
    with pytest.raises(UserError, match=r"trainer\.json: not the state of a trainer"):
        read_position(tmp_path)
