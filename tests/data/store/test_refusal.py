"""A refusal says how many rows are bad, and hints at the key that helps."""

from pathlib import Path
from typing import Any

import pytest
from sources import write_rows
from stores import SCORED, refusal

from uft_ds.data.store import building
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


@pytest.mark.usefixtures("forked_workers")
def test_a_refusal_says_how_many_rows_are_bad(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read on: to its end, to where it is broken, or for a limited number of rows, which is said."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 10)
    rows = [{"prompt": f"q{i}", "response": "" if i % 50 == 13 else "a"} for i in range(200)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert refusal(path, chat).splitlines() == [
        f"{path}:14: 'response' is empty (format jsonl)",
        f"4 of 200 rows of {path} are bad, the next:",
        f"  {path}:64: 'response' is empty",
        f"  {path}:114: 'response' is empty",
        "correct them, or set data.on_bad_row: quarantine to leave them out (of a source's rows at most the share "
        "data.max_quarantined)",
    ]
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "first")
    assert "\n4 of 200 rows of" in refusal(path, chat, workers=2)  # other processes examine most chunks
    with path.open("a") as file:
        file.write('{"prompt": "q", "resp')
    message = refusal(path, chat)
    assert f"\n4 of the first 190 rows of {path} are bad" in message  # of whole chunks
    assert f"\n{path}:201: the last line is cut off" in message
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "second")
    monkeypatch.setattr(building, "_READ_ON_ROWS", 60)
    message = refusal(path, chat)
    assert f"\n2 of the first 70 rows of {path} are bad" in message
    assert "\nthe rows after them have not been read\n" in message


def test_a_refusal_of_most_rows_asks_for_the_format(tmp_path: Path, chat: ChatTokenizer) -> None:
    """To leave out most rows would hardly be what is meant."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "t"}] * 3)
    assert "these are most of the rows: are they of format jsonl?" in refusal(path, chat)
    assert "quarantine" not in refusal(write_rows(tmp_path / "b.jsonl", [{"text": "t"}] * 3), chat)


def test_a_long_reason_is_written_once(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The other places follow; the reason says what to do, so nothing is added to it."""
    path = write_rows(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(5)])
    assert refusal(path, chat).splitlines() == [
        f"{path}:1: unknown key 'question'; set this source's `columns: {{prompt: question, response: answer}}` "
        "(format jsonl)",
        f"5 of 5 rows of {path} are bad, the next:",
        f"  {path}:2: the same",
        f"  {path}:3: the same",
    ]


@pytest.mark.parametrize(
    "wrong", [{"response": "a", "score": "1.0"}, {"response": "a", "label": 1}, {"response": "a", "scroe": 1.0}]
)
def test_most_rows_of_the_right_format_are_not_asked_for_it(
    tmp_path: Path, chat: ChatTokenizer, wrong: dict[str, Any]
) -> None:
    """A value of another type, or a slip in a key: nothing is to be looked up, and nothing is left out."""
    message = refusal(write_rows(tmp_path / "rows.jsonl", [{"prompt": "q"} | wrong] * 3), chat)
    assert "are they of format" not in message
    assert "quarantine" not in message
    one = [{"prompt": f"q{i}", "response": "a"} for i in range(3)]
    assert "quarantine" in refusal(write_rows(tmp_path / "one.jsonl", [*one, {"prompt": "q"} | wrong]), chat)


def test_scores_outside_their_scale_suggest_a_range(tmp_path: Path, chat: ChatTokenizer) -> None:
    """From the scores of all rows, the good ones too: 1 is from 0 to 1 and yet the lowest."""
    path = write_rows(tmp_path / "rows.jsonl", SCORED)
    message = refusal(path, chat)
    assert message.startswith(f"{path}:2: 'score': found 2, expected a number from 0 to 1")
    assert f"\n9 of 10 rows of {path} are bad" in message
    assert f"\n{path}: 9 of 10 scores outside of its scale; all are from 1 to 10: correct the rows, or," in message
    assert message.endswith("score_range: [1, 10]")
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "first")
    message = refusal(path, chat, score_range=(0.0, 5.0))
    assert message.startswith(f"{path}:6: 'score': found 6, expected a number from 0 to 5")
    assert message.endswith("score_range: [1, 10]")


@pytest.mark.parametrize(
    ("scores", "suggested"),
    [
        ([5], "[1, 5]"),
        ([1, 2, 5], "[1, 5]"),
        ([0, 4, 3], "[0, 4]"),
        ([0, 2.5, 5], "[0, 5]"),
        ([1.23456789, 9.87654321], "[1, 10]"),
        ([0.5, 8, 7], "[0, 10]"),
        ([-0.5, 0.5], "[-1, 1]"),
        ([-3.25, 4], "[-10, 10]"),
        ([12, 80.5], "[0, 100]"),
    ],
)
def test_the_suggested_range_is_a_usual_one_that_takes_the_scores(
    tmp_path: Path, chat: ChatTokenizer, scores: list[float], suggested: str
) -> None:
    """The narrowest of them, not the lowest and the highest score that the rows happen to have."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "score": score} for score in scores])
    assert refusal(path, chat).endswith(f"of that scale, as in score_range: {suggested}")


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ([0.1, 0.5, 0.9, 1e9], "{}: 1 of 4 scores outside of its scale; all are from 0.1 to 1000000000:"),
        ([0.1, 0.5, 100], "{}: 1 of 3 scores outside of its scale; all are from 0.1 to 100:"),
        ([0.1, 0.5, -1], "{}: 1 of 3 scores outside of its scale; all are from -1 to 0.5:"),
        ([1, 1234567], "{}: 1 of 2 scores outside of its scale; all are from 1 to 1234567:"),
        ([1234567, 2345678.5], "{}: 2 of 2 scores outside of its scale; all are from 1234567 to 2345678.5:"),
    ],
)
def test_no_range_is_suggested_for_a_slip(tmp_path: Path, chat: ChatTokenizer, scores: list[float], found: str) -> None:
    """A 100 among scores from 0 to 1 is a slip: on a scale up to 100 the others would be next to 0. No scale is
    guessed for scores that no usual one takes."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "score": score} for score in scores])
    message = refusal(path, chat)
    assert found.format(path) in message
    assert message.endswith("set this source's score_range to the lowest and the highest score of that scale")
