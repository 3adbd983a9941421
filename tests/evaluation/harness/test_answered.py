"""The answers of an evaluation on the disk: none is lost, none is half there, and those of other ranks are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.errors import CheckFailed
from uft_ds.evaluation.harness.answered import Answers, key_of


def test_answers_outlive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    """The line is dropped, those before it stay, and the next one begins on its own."""
    first = Answers(tmp_path, 0)
    first.add("a", [[-1.5, True]])
    first.close()
    with (tmp_path / "rank-0.jsonl").open("a") as file:
        file.write('{"batch": "b", "answ')
    second = Answers(tmp_path, 0)
    assert (second.get("a"), second.get("b")) == ([[-1.5, True]], None)
    second.add("c", ["text\nof two lines \u2028 ü"])
    second.close()
    third = Answers(tmp_path, 0)
    assert (third.get("a"), third.get("c")) == ([[-1.5, True]], ["text\nof two lines \u2028 ü"])
    third.close()


def test_a_number_is_read_as_it_was_written(tmp_path: Path) -> None:
    """To the last bit."""
    value = -1.0 / 3.0 * 1e-5
    writer = Answers(tmp_path, 0)
    writer.add("a", [[value, False]])
    writer.close()
    reader = Answers(tmp_path, 1)
    assert reader.get("a") == [[value, False]]
    reader.close()


def test_the_first_rank_waits_for_the_others(tmp_path: Path) -> None:
    """Until all batches are there; a rank that is lost before is an error that says so."""
    first, other = Answers(tmp_path, 0), Answers(tmp_path, 1)
    looks: list[list[str]] = []

    def on_look(there: list[str]) -> None:
        looks.append(there)
        other.add("b", ["y"])

    other.add("a", ["x"])
    first.wait_for(["a", "b"], lambda: None, on_look)
    assert looks == [["a"], ["a", "b"]]
    assert first.get("b") == ["y"]
    with pytest.raises(CheckFailed, match="process 1 of 2 has ended; what was answered is kept"):
        first.wait_for(["a", "c"], lambda: "process 1 of 2 has ended", lambda there: None)
    first.close()
    other.close()


def test_what_a_rank_wrote_before_its_end_counts(tmp_path: Path) -> None:
    """It may end between two looks."""
    first, other = Answers(tmp_path, 0), Answers(tmp_path, 1)

    def ended() -> str:
        other.add("a", ["x"])
        return "process 1 of 2 has ended"

    first.wait_for(["a"], ended, lambda there: None)
    assert first.get("a") == ["x"]
    first.close()
    other.close()


def test_a_measured_number_is_measured_once(tmp_path: Path) -> None:
    """Other ranks and later tries take it over."""
    first, other = Answers(tmp_path, 0), Answers(tmp_path, 1)
    assert first.agreed("tokens", lambda: 7) == 7
    assert first.agreed("rows", lambda: 3) == 3
    assert other.agreed("tokens", lambda: 8) == 7
    first.close()
    other.close()
    again = Answers(tmp_path, 0)
    assert again.agreed("rows", lambda: 9) == 3
    again.close()


def test_keys_tell_requests_apart() -> None:
    """By kind, arguments and order; keys of a dict have none."""
    pair = [["a", "b"], ["c", "d"]]
    keys = {
        key_of("loglikelihood", pair),
        key_of("generate_until", pair),
        key_of("loglikelihood", pair[::-1]),
        key_of("loglikelihood", [["ab", ""], ["c", "d"]]),
    }
    assert len(keys) == 4
    assert key_of("g", [["a", {"x": 1, "y": 2}]]) == key_of("g", [["a", {"y": 2, "x": 1}]])
