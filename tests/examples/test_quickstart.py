"""The order of the quickstart's work: what an interrupted one keeps, and when all is done anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from suites import long_but
from tiny import build_tiny_model

from uft_ds.errors import CheckFailed, UserError
from uft_ds.examples import measuring, quickstart
from uft_ds.examples.verifiable import Task
from uft_ds.export.agreement import Agreement
from uft_ds.export.convert import Conversion
from uft_ds.recipe.file import dump_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.settings import located


class Work:
    """Stands for training, merging and answering: what was asked for, in order.

    interrupted_at: the work at which Ctrl-C comes. learned: whether the trained model answers better than the base.
    """

    def __init__(self, base: Path) -> None:
        self.base, self.done, self.interrupted_at, self.learned = base, list[Any](), "", True

    def _do(self, what: Any) -> None:
        self.done.append(what)
        if what == self.interrupted_at:
            raise KeyboardInterrupt

    def train(self, settings: Settings, *, overwrite: bool, resume: bool) -> None:
        folder = RunFolder(settings.output)
        folder.path.mkdir(exist_ok=True)
        folder.recipe.write_text(dump_recipe(located(settings).stored), encoding="utf-8")
        for path in (folder.lock, folder.environment):
            path.touch()
        self._do("resume" if resume else "overwrite" if overwrite else "new")

    def convert(self, run: Path, merged: Path, **_: Any) -> Conversion:
        self._do("merge")
        return Conversion(merged, run, Agreement(3, 1.0, 0.0, 0.0, 1.0))

    def answers(self, model: Path, tasks: tuple[Task, ...], console: Console) -> list[measuring.Answer]:
        self._do("base answers" if model == self.base else "trained model answers")
        knows = self.learned and model != self.base
        return measuring.graded(tasks, [task.answer if knows else "?" for task in tasks])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    base = build_tiny_model(tmp_path / "base", "llama")
    found = Work(base)
    monkeypatch.setattr(quickstart, "quickstart_model", lambda say: base)
    monkeypatch.setattr(quickstart, "convert_to_merged", found.convert)
    monkeypatch.setattr(quickstart, "answers_of", found.answers)
    return found


def run(work: Work, folder: Path, *overrides: str, ends_by: type[BaseException] | None = None) -> tuple[list[Any], str]:
    """(what was done, what was printed)."""
    work.done.clear()
    console = Console(width=200, markup=False)
    with console.capture() as printed:
        if ends_by is None:
            quickstart.run_quickstart(folder, overrides, console=console, train=work.train)
        else:
            with pytest.raises(ends_by):
                quickstart.run_quickstart(folder, overrides, console=console, train=work.train)
    return list(work.done), printed.get()


WHOLE = ["base answers", "overwrite", "merge", "trained model answers"]


def test_an_interrupted_quickstart_goes_on(work: Work, tmp_path: Path) -> None:
    """At the last answers: the base is not asked again and the run is resumed; a complete one starts anew."""
    work.interrupted_at = "trained model answers"
    assert run(work, tmp_path, ends_by=KeyboardInterrupt)[0] == WHOLE
    work.interrupted_at = ""
    done, said = run(work, tmp_path)
    assert done == ["resume", "merge", "trained model answers"]
    assert f"has answered the 100 held-out prompts before: {tmp_path / 'quickstart-data' / 'base_answers.json'}" in said
    assert "the run that was interrupted goes on" in said
    assert "It worked: of 100 prompts that it never saw, 100 are answered exactly right (0 before)." in said
    assert json.loads((tmp_path / "quickstart" / "quickstart.json").read_text())["before"][0]["response"] == "?"
    work.interrupted_at = "overwrite"
    assert run(work, tmp_path, ends_by=KeyboardInterrupt)[0] == ["overwrite"]
    work.interrupted_at = ""
    assert run(work, tmp_path)[0] == ["resume", *WHOLE[2:]], "an older quickstart's end is not this one's"


@pytest.mark.parametrize("way", ["quickstart", "quickstart_online"])
def test_every_source_of_a_quickstart_is_written_before_it_trains(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Of the data in its folder: right answers and scored ones are held out, and neither is trained on."""
    trained: dict[str, Settings] = {}

    def train(settings: Settings, **how: bool) -> None:
        trained[settings.output.name] = settings
        settings.output.mkdir()

    monkeypatch.setattr(quickstart, "finish", lambda *args: None)  # nothing was learned here
    start = quickstart.run_quickstart if way == "quickstart" else quickstart.run_online
    start(tmp_path, (), console=Console(quiet=True), train=train)
    data = trained[way].data
    folder = tmp_path / "quickstart-data"
    held_out, sources = ([Path(source.path) for source in part] for part in (data.held_out, data.sources))
    assert held_out == [folder / "held_out.jsonl", folder / "held_out_scored.jsonl"]
    assert sources == [folder / "instruction.jsonl", folder / "scored.jsonl"]
    assert all(path.is_file() for path in (*held_out, *sources))


def test_a_run_that_cannot_be_resumed_is_told_with_what_to_do(work: Work, tmp_path: Path) -> None:
    """Its inputs may be others since: the quickstart has no --overwrite."""
    work.interrupted_at = "merge"
    run(work, tmp_path, ends_by=KeyboardInterrupt)

    def refuse(settings: Settings, **how: bool) -> None:
        raise UserError("the data has changed")

    with pytest.raises(UserError) as refused:
        quickstart.run_quickstart(tmp_path, (), console=Console(quiet=True), train=refuse)
    assert str(refused.value) == f"the data has changed\nto train anew, delete {tmp_path / 'quickstart'}"


def test_another_recipe_starts_anew(work: Work, tmp_path: Path) -> None:
    """What was interrupted is another run; the base's answers are the same."""
    work.interrupted_at = "merge"
    run(work, tmp_path, ends_by=KeyboardInterrupt)
    work.interrupted_at = ""
    assert run(work, tmp_path, "train.lr=1e-4")[0] == WHOLE[1:]


@pytest.mark.parametrize("change", long_but(["another model"], ["another model", "a damaged file", "fewer answers"]))
def test_answers_are_those_of_this_model(work: Work, tmp_path: Path, change: str) -> None:
    """Kept by the content of its files; a file that cannot be read is written again."""
    kept = tmp_path / "quickstart-data" / "base_answers.json"
    run(work, tmp_path)
    if change == "another model":
        config = json.loads((work.base / "config.json").read_text())
        (work.base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    elif change == "a damaged file":
        kept.write_text(kept.read_text()[:100])
    else:
        content = json.loads(kept.read_text())
        kept.write_text(json.dumps(content | {"responses": content["responses"][:-1]}))
    assert run(work, tmp_path)[0] == WHOLE
    assert run(work, tmp_path)[0] == WHOLE[1:]


def test_a_quickstart_that_has_not_learned_says_so(work: Work, tmp_path: Path) -> None:
    """It fails, and does not say that it worked."""
    work.learned = False
    _, said = run(work, tmp_path, ends_by=CheckFailed)
    assert "It worked" not in said


def test_a_folder_that_cannot_be_written_comes_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file nothing can be made; the command tells the path of such an error with exit code 2."""
    monkeypatch.setattr(quickstart, "quickstart_model", lambda **_: pytest.fail("the model was fetched"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as refused:
        quickstart.run_quickstart(tmp_path / "file", (), console=Console(quiet=True), train=pytest.fail)
    assert refused.value.filename == str(tmp_path / "file" / "quickstart-data")
