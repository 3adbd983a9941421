"""What is refused of a recipe's data before anything is launched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from sources import write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import PreparedData, find_tasks, prepare_data, read_report
from uft_ds.training.steps import steps_of


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def prepared(
    chat: ChatTokenizer, folder: Path, train: dict[str, Any], *portions: dict[str, Any]
) -> tuple[Settings, PreparedData]:
    """Sources of 100 rows each, with their portions."""
    sources = []
    for number, portion in enumerate(portions):
        rows = [{"prompt": f"q{number} {i}", "response": "a"} for i in range(100)]
        sources.append({"format": "jsonl", "path": str(write_rows(folder / f"{number}.jsonl", rows)), **portion})
    data = {"sources": sources, "cache_dir": str(folder / "tokens"), "max_length": 64, "workers": 1}
    tree = {"name": "x", "model": {"base": "b"}, "data": data, "objective": {}, "output": "o", "train": train}
    settings = settings_of(recipe_from_tree(tree, "x"))
    return settings, prepare_data(settings, chat)


def both(chat: ChatTokenizer, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> PreparedData:
    """A source that is trained on, and one that is held out, of the same 40 rows under two spellings of a path."""
    rows = [{"prompt": f"q{i}", "response": "a", "score": i % 3 / 2} for i in range(40)]
    write_rows(folder / "rows.jsonl", rows)
    sources = [
        {"format": "jsonl", "path": str(folder / spelling), **changes}
        for spelling, changes in (("rows.jsonl", first), ("../" + folder.name + "/rows.jsonl", second))
    ]
    data = {"sources": sources[:1], "held_out": sources[1:], "cache_dir": str(folder / "tokens"), "max_length": 64}
    tree = {"name": "x", "model": {"base": "b"}, "data": {**data, "workers": 1}, "objective": {}, "output": "o"}
    return prepare_data(settings_of(recipe_from_tree(tree, "x")), chat)


@pytest.mark.parametrize(
    "key", ["data.sources.0.path", "data.sources.1.path", "data.held_out.0.path", "evaluate.tasks.0.path"]
)
@pytest.mark.parametrize("fault", ["missing", "dead link", "no file", "unknown kind", "not readable"])
def test_a_source_that_is_not_there_is_named_by_its_key(
    chat: ChatTokenizer, tmp_path: Path, key: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe's key and the path: a recipe may have many sources, and a path may stand in none as it is typed."""
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(4)]
    paths = {
        given: write_rows(
            tmp_path / f"{number}.jsonl", [{**row, "prompt": f"{number} {row['prompt']}"} for row in rows]
        )
        for number, given in enumerate(
            ("data.sources.0.path", "data.sources.1.path", "data.held_out.0.path", "evaluate.tasks.0.path")
        )
    }
    path = paths[key]
    opened = Path.open

    def refusing(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    if fault == "not readable":  # the tests may run as root, who may read everything
        monkeypatch.setattr(Path, "open", refusing)
        words = r"cannot be read \(Permission denied\)"
    elif fault == "unknown kind":
        path = paths[key] = path.rename(path.with_suffix(".txt"))
        words = "unknown kind of file"
    else:
        path.unlink()
        words = "no such file or folder"
    if fault == "dead link":
        path.symlink_to("gone")
        words = "a link to gone, which is not there"
    if fault == "no file":
        os.mkfifo(path)
        words = "a pipe, a device or a socket"
    *sources, held_out = [{"format": "jsonl", "path": str(path)} for path in list(paths.values())[:3]]
    data = {"sources": sources, "held_out": [held_out], "cache_dir": str(tmp_path / "tokens"), "workers": 1}
    task = {"name": "t", "path": str(paths["evaluate.tasks.0.path"]), "score_by": "regex:a"}
    tree = {"name": "x", "model": {"base": "b"}, "data": data, "objective": {}, "output": "o"}
    tree |= {"evaluate": {"tasks": [task]}}
    settings = settings_of(recipe_from_tree(tree, "x"))
    tokenised: list[str] = []

    def prepare() -> None:
        find_tasks(settings)
        prepare_data(settings, chat, lambda label, done, total: tokenised.append(label))

    with pytest.raises(UserError, match=rf"^{re.escape(key)}: {re.escape(str(path))}: {words}"):
        prepare()
    assert tokenised == [], "what is missing is found before the first source is read"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"score": 0.3}),
        ({"pairs": "split"}, {}),
        ({}, {"examples": 5}),
        ({"where": {"score": 0.5}}, {"where": {"score": 0.5}, "pairs": "split"}),
        ({}, {"where": {"score": 0.5}}),
        ({"where": {"prompt": "q1", "score": 0.5}}, {"where": {"score": 0.5}}),
    ],
)
def test_no_row_is_used_twice(
    chat: ChatTokenizer, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Whatever rules it is read by: held-out losses of rows that are trained on mean nothing."""
    with pytest.raises(UserError, match=r"rows\.jsonl: holds the rows of .*rows\.jsonl; no row may be used twice"):
        both(chat, tmp_path, first, second)


def test_other_rows_of_one_file_are_another_source(chat: ChatTokenizer, tmp_path: Path) -> None:
    """Each `where` takes its own."""
    data = both(chat, tmp_path, {"where": {"score": 0.0}}, {"where": {"score": 1.0}})
    assert [source.selection.num_responses for source in data.all] == [14, 13]


@pytest.mark.parametrize("train", [{}, {"steps": 3}])
def test_a_mixture_of_no_steps_is_refused(chat: ChatTokenizer, tmp_path: Path, train: dict[str, Any]) -> None:
    """With the keys that make it so, what it holds and what a step takes; also where it would be repeated for ever."""
    with pytest.raises(UserError) as refused:
        prepared(chat, tmp_path, train, {"epochs": 0.004}, {"share": 0.5})
    first, second, rest = str(refused.value).splitlines()
    assert first == "data.sources.0.epochs: 0.004 given, which takes 0.4 of 100 responses"
    assert second == "data.sources.1.share: 0.5 given, which takes 0.4 of 100 responses"
    assert "holds 0.8 responses" in rest
    assert "a step takes 64 (train.examples_per_step)" in rest


@pytest.mark.parametrize(
    ("train", "portion"), [({}, {"epochs": 0.005}), ({"epochs": 2}, {"epochs": 0.004}), ({"steps": 1}, {"epochs": 1})]
)
def test_a_mixture_of_one_response_is_a_step(
    chat: ChatTokenizer, tmp_path: Path, train: dict[str, Any], portion: dict[str, Any]
) -> None:
    """Half a row is rounded up, and two epochs of 0.4 rows hold one: the run has a step."""
    assert len(steps_of(*prepared(chat, tmp_path, train, portion))) == 1


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "{}", '{"train": 3, "held_out": []}', '{"train": [1], "held_out": []}', "[" * 100_000,
     '{"train": [{"files": []}], "held_out": []}', '{"train": [{"tokens_key": "a", "files": 1}], "held_out": []}'],
)  # fmt: skip
def test_a_damaged_report_is_named(tmp_path: Path, text: str | None) -> None:
    """A resume reads it to find the run's own tokens."""
    folder = RunFolder(tmp_path)
    folder.data_report().parent.mkdir()
    if text is not None:
        folder.data_report().write_text(text)
    with pytest.raises(UserError, match=rf"^{folder.data_report()}: .*bring it back from a copy of the run"):
        read_report(folder)
