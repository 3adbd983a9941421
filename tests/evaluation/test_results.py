"""The folder of an evaluation: read as written, whole or not there, and refused where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.results import (
    RESULTS,
    Evaluation,
    ItemResult,
    TaskResult,
    items_path,
    read_evaluation,
    read_items,
    write_evaluation,
)

FOUND = Evaluation(
    "policy",
    {"base": "tiny", "sha256": "0" * 64},
    {"limit": 2},
    [TaskResult("gsm8k", {"exact_match,strict-match": 0.5}, 2, "3", 5), TaskResult("mt_bench", {"grade": 7.5}, 2, "1")],
)
ITEMS = {
    "gsm8k": [ItemResult("a", {"exact_match,strict-match": 1.0}), ItemResult("b", {"exact_match,strict-match": 0.0})]
}


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Numbers, settings and items, also of a task with a slash in its name."""
    write_evaluation(tmp_path, FOUND, ITEMS | {"group/task": ITEMS["gsm8k"]})
    assert read_evaluation(tmp_path) == FOUND
    assert read_items(tmp_path, "gsm8k") == ITEMS["gsm8k"]
    assert read_items(tmp_path, "group/task") == ITEMS["gsm8k"]


def test_a_folder_without_results_has_not_ended(tmp_path: Path) -> None:
    """Also if items lie there."""
    write_evaluation(tmp_path, FOUND, ITEMS)
    (tmp_path / RESULTS).unlink()
    with pytest.raises(UserError, match=r"no results\.json: expected the folder of an evaluation that has ended"):
        read_evaluation(tmp_path)


def test_a_number_that_is_none_is_never_written(tmp_path: Path) -> None:
    """Neither of a task nor of an item, and nothing else is written then."""
    nan = float("nan")
    with pytest.raises(ValueError, match="t: m is nan"):
        write_evaluation(tmp_path, Evaluation("a", {}, {}, [TaskResult("t", {"m": nan}, 1, "1")]), {})
    with pytest.raises(ValueError, match="gsm8k: item x"):
        write_evaluation(tmp_path, FOUND, {"gsm8k": [ItemResult("x", {"m": nan})]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of 'uft_ds evaluation'; expected 1"),
        ({"tasks": [{"task": "t"}]}, "not the results of an evaluation"),
        ({"tasks": [{"task": "t", "metrics": {"m": "1"}, "items": 1, "version": "1"}]}, "a metric is no finite number"),
        ({"tasks": 3}, "not the results of an evaluation"),
        ({"settings": None}, "model and settings are no objects"),
        ({"name": 3}, "a name is no text"),
        ({"tasks": [{"task": "t", "metrics": {}, "items": 1, "version": 1}]}, "a name is no text"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    """With the file's name and what is wrong with it."""
    write_evaluation(tmp_path, FOUND, ITEMS)
    path = tmp_path / RESULTS
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as raised:
        read_evaluation(tmp_path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("line", ['{"item": "a"}', '{"item": 3}', "[]", '{"item": "c", "m": NaN}', "{", '{"m": 1}'])
def test_a_damaged_item_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    """An item that stands there twice, too: a comparison in pairs would count it twice."""
    write_evaluation(tmp_path, FOUND, ITEMS)
    with items_path(tmp_path, "gsm8k").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="line 3: not an item"):
        read_items(tmp_path, "gsm8k")
