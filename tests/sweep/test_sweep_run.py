"""The runs of a sweep: what is run again, what stops, and the table. The runs themselves are stood in for."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from sweeps import RECIPE, SWEEP, sweep_of

from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from uft_ds.host.files import write_atomically
from uft_ds.recipe.file import dump_recipe, load_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.settings import located
from uft_ds.sweep.file import Sweep
from uft_ds.sweep.run import How, Result, last_values, run_sweep, table_of, write_recipes

_RAISED = {2: UserError("a bad row"), 3: OSError("no space left"), 4: KeyboardInterrupt()}


class Trainer:
    """Stands for a launch: leaves what a run leaves, or fails where it is told to."""

    def __init__(self, **exit_codes: int) -> None:
        self.exit_codes, self.trained, self.hows = exit_codes, list[str](), list[How]()

    def __call__(self, settings: Settings, how: How) -> tuple[Path, Status]:
        folder = RunFolder(settings.output)
        self.trained.append(settings.name)
        self.hows.append(how)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock.touch()
        write_atomically(folder.recipe, dump_recipe(located(settings).stored))
        adapter = settings.reference.adapter
        identity = (Path(adapter) / "adapter").read_text() if adapter else None
        folder.environment.write_text(json.dumps({"reference_adapter": identity}))
        (folder.path / "adapter").write_text(f"{settings.name} {len(self.trained)} {id(self)}")
        code = self.exit_codes.get(settings.name.split("-")[0], 0)
        if code in _RAISED:
            raise _RAISED[code]
        if code == 0:
            lines = [
                {"step": 1, "loss": 1.0, "seconds": 4.0},
                {"step": 2, "loss": settings.train.lr, "seconds": 3.0},
                {"step": 2, "held_out/loss": 0.5, "x": None},
            ]
            folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            folder.done.touch()
        return folder.path, Status(code, "")


def run(sweep: Sweep, trainer: Trainer, *, overwrite: bool = False) -> list[Result]:
    return run_sweep(sweep, Console(file=io.StringIO()), check=lambda recipe: None, train=trainer, overwrite=overwrite)


@pytest.fixture
def no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins' adapters are one file of text, which is its content."""
    for module in ("uft_ds.run.settings", "uft_ds.sweep.run"):
        monkeypatch.setattr(f"{module}.adapter_folder", Path)
    monkeypatch.setattr("uft_ds.sweep.run.adapter_identity", lambda folder: (folder / "adapter").read_text())


@pytest.mark.usefixtures("no_adapters")
def test_what_cannot_be_run_is_told_before_anything_is() -> None:
    """Of the last run too, which starts from one that is yet to be trained; what is done is not checked again."""
    sweep, checked, trainer = sweep_of(grid=None), list[tuple[str, str | None]](), Trainer()

    def check(settings: Settings) -> None:
        checked.append((settings.name, settings.reference.adapter))
        if settings.name == "uft":
            raise UserError("data.sources.0: no such file\nmore")

    def run_it(check: Any) -> list[Result]:
        return run_sweep(sweep, Console(file=io.StringIO()), check=check, train=trainer, overwrite=False)

    with pytest.raises(UserError, match=r"^run uft: data\.sources\.0: no such file\nrun uft: more$"):
        run_it(check)
    assert checked == [("sft", None), ("una", None), ("uft", None)]
    assert not trainer.trained
    assert not sweep.output.exists()
    run_it(lambda recipe: None)
    checked.clear()
    run_it(check)
    assert not checked
    shutil.rmtree("runs/both/sft")
    run_it(lambda settings: checked.append((settings.name, None)))
    assert [name for name, _ in checked] == ["sft", "una"], "the second stage is trained anew, too"


@pytest.mark.usefixtures("no_adapters")
def test_what_is_done_is_not_done_again() -> None:
    """The second time nothing is trained, and the table is the same; --overwrite trains all."""
    sweep, trainer = sweep_of(grid={"train.seed": [1, 2]}), Trainer()
    first = run(sweep, trainer)
    assert trainer.trained == [planned.name for planned in sweep.runs]
    again = run(sweep, trainer)
    assert len(trainer.trained) == 6
    assert [result.metrics for result in again] == [result.metrics for result in first]
    run(sweep, trainer, overwrite=True)
    assert len(trainer.trained) == 12


@pytest.mark.usefixtures("no_adapters")
def test_a_second_stage_follows_its_first() -> None:
    """The first stage's folder is deleted: it is trained anew, and so is what started from the old adapter."""
    sweep, trainer = sweep_of(grid=None), Trainer()
    run(sweep, trainer)
    shutil.rmtree("runs/both/sft")
    run(sweep, trainer)
    assert trainer.trained == ["sft", "una", "uft", "sft", "una"]


@pytest.mark.parametrize("removed", ["where", "beta"])
def test_a_key_that_is_gone_is_a_change_too(removed: str) -> None:
    """A run whose recipe said more than it does now is another run."""
    values = {"data.sources.0.where": {"split": "train"}, "objective.beta": {"score": 0.1, "pair": 0.2}}
    runs = [{"name": "uft", "recipe": "toy.yaml", "set": values}]
    run(sweep_of(grid=None, runs=runs), Trainer())
    fewer = values | ({"data.sources.0.where": {}} if removed == "where" else {"objective.beta": {"score": 0.1}})
    with pytest.raises(UserError, match=r"another recipe \(.*: \(absent\) now, (train|0.2) then\)"):
        run(sweep_of(grid=None, runs=[runs[0] | {"set": fewer}]), Trainer())


@pytest.mark.usefixtures("no_adapters")
def test_a_done_run_of_another_recipe_is_refused() -> None:
    """Its numbers would stand in the table as those of this one."""
    run(sweep_of(grid=None), Trainer())
    trainer = Trainer()
    changed = [*SWEEP["runs"][:2], {"name": "uft", "recipe": "toy.yaml", "set": {"train.lr": 0.5}}]
    with pytest.raises(UserError, match=r"uft: holds a run of another recipe \(train.lr: 0.5 now, 3.0e-05 then\)"):
        run(sweep_of(grid=None, runs=changed), trainer)
    assert not trainer.trained


@pytest.mark.parametrize("code", [1, 2, 3], ids=["exit code", "bad input", "any other error"])
@pytest.mark.usefixtures("no_adapters")
def test_a_failure_stops_those_that_start_from_it(code: int) -> None:
    """sft fails: una is skipped, uft runs; once sft is mended, una runs, too."""
    sweep, trainer = sweep_of(grid=None), Trainer(sft=code)
    assert [result.status for result in run(sweep, trainer)] == ["failed", "skipped", "done"]
    assert trainer.trained == ["sft", "uft"]
    trainer = Trainer()
    assert [result.status for result in run(sweep, trainer)] == ["done", "done", "done"]
    assert trainer.trained == ["sft", "una"]


@pytest.mark.usefixtures("no_adapters")
@pytest.mark.parametrize("code", [2, 3], ids=["bad input", "any other error"])
def test_what_a_run_fails_by_does_not_control_the_terminal(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors name rows and files, whose text is of others."""
    monkeypatch.setitem(_RAISED, code, type(_RAISED[code])("a\x1b[2J.jsonl:1: bad"))
    run(sweep_of(grid=None), Trainer(sft=code))
    shown = capsys.readouterr().err
    assert "a␛[2J.jsonl:1: bad" in shown
    assert "\x1b" not in shown


@pytest.mark.usefixtures("no_adapters")
@pytest.mark.parametrize("code", [EXIT_INTERRUPTED, 4], ids=["of the ranks", "while preparing"])
def test_an_interruption_ends_the_sweep(code: int) -> None:
    """Ctrl-C means all of it."""
    trainer = Trainer(una=code)
    assert [result.status for result in run(sweep_of(grid=None), trainer)] == ["done", "interrupted"]


@pytest.mark.usefixtures("no_adapters")
def test_the_table_holds_every_run_and_every_metric() -> None:
    """The grid's values, how it ended, the last value of each metric; empty where a run has none."""
    run(sweep_of(grid={"train.lr": [1e-4, 3e-5]}), Trainer(sft=1))
    with Path("runs/both/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[:3]] == ["sft-lr=0.0001", "una-lr=0.0001", "uft-lr=0.0001"]
    assert [row["status"] for row in rows] == ["failed", "skipped", "done"] * 2
    assert [row["loss"] for row in rows] == ["", "", "0.0001", "", "", "3e-05"]
    assert {row["held_out/loss"] for row in rows} == {"", "0.5"}
    assert [row["seconds"] for row in rows] == ["0", "0", "7"] * 2, "of all steps"
    assert [row["train.lr"] for row in rows] == ["0.0001"] * 3 + ["3e-05"] * 3
    assert [row["objective.loss"] for row in rows] == ["nll", "mse", "mse"] * 2, "what the recipes differ in"
    assert "train.seed" not in rows[0], "nor what they have in common"


@pytest.mark.usefixtures("no_adapters")
def test_a_map_of_the_grid_is_one_column() -> None:
    """Not one more for each of its keys."""
    losses = ["mse", {"pair": "dpo", "score": "mse"}]
    run(sweep_of(grid={"objective.loss": losses}, runs=SWEEP["runs"][2:]), Trainer())
    with Path("runs/both/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [name for name in rows[0] if name.startswith("objective")] == ["objective.loss"]


@pytest.mark.usefixtures("no_adapters")
def test_recipes_are_read_before_the_first_run() -> None:
    """What somebody writes into their files while the runs train neither stops them nor relabels them."""

    class Editor(Trainer):
        def __call__(self, settings: Settings, overwrite: bool) -> tuple[Path, Status]:
            Path("toy.yaml").write_text(yaml.safe_dump(RECIPE | {"train": {"lr": 9.0, "stpes": 3}}))
            return super().__call__(settings, overwrite)

    results = run(sweep_of(grid=None), Editor())
    assert [result.status for result in results] == ["done"] * 3
    assert {result.metrics["loss"] for result in results} == {3e-5}


@pytest.mark.usefixtures("no_adapters")
def test_a_column_that_is_no_metric_is_said() -> None:
    """The table would lack it without a word."""
    said = io.StringIO()
    sweep = sweep_of(grid=None, columns=["loss", "held_out/los"])
    run_sweep(sweep, Console(file=said), check=lambda recipe: None, train=Trainer(), overwrite=False)
    assert said.getvalue().count("note: columns: no run has a metric 'held_out/los'") == 1
    assert said.getvalue().count("note: columns") == 1


def test_last_values_are_the_last(tmp_path: Path) -> None:
    """A null is a value that was not finite, and what was before it is not the last."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1, "a": 1.0, "b": 2.0}\n{"step": 2, "a": null, "b": 3.0}\n')
    last = last_values(folder)
    assert math.isnan(last.pop("a"))
    assert last == {"step": 2, "b": 3.0}


@pytest.mark.usefixtures("no_adapters")
def test_a_run_that_was_stopped_goes_on() -> None:
    """A folder of the same recipe is gone on with; one of another recipe that has no checkpoint begins anew."""
    trainer = Trainer(sft=EXIT_STOPPED)
    assert [result.status for result in run(sweep_of(grid=None), trainer)] == ["stopped"]
    assert trainer.hows == [How(overwrite=False, resume=False)]
    trainer = Trainer(una=1)
    run(sweep_of(grid=None), trainer)
    assert trainer.hows[:2] == [How(overwrite=False, resume=True), How(overwrite=False, resume=False)]
    changed = [*SWEEP["runs"][:1], {**SWEEP["runs"][1], "set": {"train.lr": 0.5}}, SWEEP["runs"][2]]
    trainer = Trainer()
    run(sweep_of(grid=None, runs=changed), trainer)
    assert trainer.hows == [How(overwrite=True, resume=False)]


@pytest.mark.usefixtures("no_adapters")
def test_an_unfinished_run_of_another_recipe_is_kept() -> None:
    """It has a checkpoint: the sweep does not start, and nothing is deleted; --overwrite does both."""
    run(sweep_of(grid=None), Trainer(una=1))
    checkpoint = Path("runs/both/una/checkpoints/step-000200")
    checkpoint.mkdir(parents=True)
    changed = [SWEEP["runs"][0], {**SWEEP["runs"][1], "set": {"train.lr": 0.5}}, SWEEP["runs"][2]]
    sweep, trainer = sweep_of(grid=None, runs=changed), Trainer()
    for refused in (lambda: run(sweep, trainer), lambda: table_of(sweep, Console(file=io.StringIO()))):
        with pytest.raises(UserError, match=r"una: holds a run of another recipe \(train.lr: 0.5 now, 3.0e-05 then\)"):
            refused()
    assert checkpoint.exists()
    assert not trainer.trained
    run(sweep, trainer, overwrite=True)
    assert trainer.trained == ["sft", "una", "uft"]


@pytest.mark.usefixtures("no_adapters")
def test_how_a_run_is_computed_makes_no_other_run() -> None:
    """What --resume allows: unfinished runs go on, and done ones are done."""
    run(sweep_of(grid=None), Trainer(una=1))
    Path("runs/both/una/checkpoints/step-000200").mkdir(parents=True)
    computed = {"train.tokens_per_micro_batch": 4096, "data.workers": 1, "train.checkpoint_every": 7}
    runs = [{**planned, "set": {**planned.get("set", {}), **computed}} for planned in SWEEP["runs"]]
    trainer = Trainer()
    run(sweep_of(grid=None, runs=runs), trainer)
    assert trainer.trained == ["una"]
    assert trainer.hows == [How(overwrite=False, resume=True)]


def test_recipes_of_a_sweep_for_jobs_beside_each_other(tmp_path: Path) -> None:
    """A folder a point of the grid, numbered, with its stages in their order; each is a recipe that trains that run."""
    sweep = sweep_of(grid={"train.lr": [1e-4, 3e-5]})
    folders = write_recipes(sweep, tmp_path / "jobs")
    assert [folder.name for folder in folders] == ["0", "1"]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    stages = list(enumerate(("sft", "una", "uft")))
    assert names == [[f"{i}-{stage}-lr={lr}.yaml" for i, stage in stages] for lr in ("0.0001", "3e-05")]
    second = load_recipe(str(folders[1] / "1-una-lr=3e-05.yaml"))
    assert second.train.lr == 3e-5
    assert second.reference.adapter == str((sweep.output / "sft-lr=3e-05").absolute()), "yet to be trained"
    assert Path(second.output) == (sweep.output / "una-lr=3e-05").absolute()
    write_recipes(sweep, tmp_path / "jobs")  # the same again
    (tmp_path / "jobs" / "0" / "other.yaml").touch()
    with pytest.raises(UserError, match="holds other files"):
        write_recipes(sweep, tmp_path / "jobs")


@pytest.mark.usefixtures("no_adapters")
def test_a_table_of_what_has_been_run_elsewhere() -> None:
    """Without running anything: done, how it ended, or not started."""
    sweep = sweep_of(grid=None)
    run(sweep, Trainer(sft=1, uft=0))
    RunFolder(sweep.output / "sft").write_status(Status(1, "rank 1 was killed"))
    results = table_of(sweep, Console(file=io.StringIO()))
    how_far = "step 0, newest checkpoint: none; rank 1 was killed"
    assert [result.status for result in results] == [how_far, "not started", "done"]
    with (sweep.output / "table.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == [result.status for result in results]


def test_where_nothing_can_be_written_the_path_is_named(tmp_path: Path) -> None:
    """A file in the way of the sweep's folder, a folder in the way of its table; before the first run trains."""
    Path("in_the_way").touch()
    Path("runs/both/table.csv").mkdir(parents=True)
    console = Console(file=io.StringIO())
    for sweep, place in ((sweep_of(output="in_the_way"), "in_the_way/table.csv"), (sweep_of(), "runs/both/table.csv")):
        with pytest.raises(UserError, match=rf"{place}: cannot be written \(.*give another folder"):
            table_of(sweep, console)
        with pytest.raises(UserError, match=rf"{place}: cannot be written"):
            run_sweep(
                sweep,
                console,
                check=lambda settings: None,
                train=lambda settings, how: pytest.fail("trains"),
                overwrite=False,
            )
    with pytest.raises(UserError, match=r"in_the_way.*: cannot be written \(Not a directory"):
        write_recipes(sweep_of(), Path("in_the_way"))


def test_a_table_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the first run: the others are run, and the sweep says what is missing."""
    trained: list[str] = []

    def fails(*_: Any) -> None:
        raise UserError("table.csv: cannot be written (No space left on device)")

    def train(settings: Settings, how: How) -> tuple[Path, Status]:
        trained.append(settings.name)
        return settings.output, Status(1, "x")

    monkeypatch.setattr("uft_ds.sweep.run.write_table", fails)
    sweep = sweep_of(
        grid=None,
        runs=[{"name": "a", "recipe": "toy.yaml"}, {"name": "b", "recipe": "toy.yaml", "set": {"train.lr": 1.0}}],
    )
    with pytest.raises(UserError, match="No space left"):
        run_sweep(sweep, Console(file=io.StringIO()), check=lambda settings: None, train=train, overwrite=False)
    assert trained == ["a", "b"]
