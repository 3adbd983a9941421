"""A sweep: what it plans, what it runs again, what stops, and its table. The runs themselves are stood in for."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from uft_ds.host.files import write_atomically
from uft_ds.recipe.file import dump_recipe, load_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.settings import located
from uft_ds.sweep.file import Sweep, grid_of, load_sweep
from uft_ds.sweep.run import How, Result, last_values, run_sweep, table_of, write_recipes

RECIPE: dict[str, Any] = {
    "name": "toy",
    "model": {"base": "base"},
    "data": {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]},
    "output": "runs/toy",
}
SWEEP: dict[str, Any] = {
    "name": "both",
    "output": "runs/both",
    "runs": [
        {"name": "sft", "recipe": "toy.yaml", "set": {"objective.loss": "nll"}},
        {"name": "una", "recipe": "toy.yaml", "after": "sft"},
        {"name": "uft", "recipe": "toy.yaml"},
    ],
    "grid": {"train.lr": [1e-4, 3e-5], "train.seed": [1, 2]},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(RECIPE))


def sweep_of(**changes: Any) -> Sweep:
    tree = {key: value for key, value in (SWEEP | changes).items() if value is not None}
    Path("sweep.yaml").write_text(yaml.safe_dump(tree))
    return load_sweep("sweep.yaml")


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


def test_a_grid_repeats_every_run_with_every_combination() -> None:
    """Three runs times two learning rates times two seeds, a point of the grid after the other."""
    sweep = sweep_of()
    assert [planned.name for planned in sweep.runs[:4]] == [
        "sft-lr=0.0001-seed=1", "una-lr=0.0001-seed=1", "uft-lr=0.0001-seed=1", "sft-lr=0.0001-seed=2",
    ]  # fmt: skip
    assert len(sweep.runs) == len({planned.name for planned in sweep.runs}) == 12
    settings = sweep.runs[-2].settings
    assert (settings.train.lr, settings.train.seed, settings.given.loss) == (3e-5, 2, "mse")
    assert settings.reference.adapter == "runs/both/sft-lr=3e-05-seed=2", "the first stage of the same point"
    assert str(settings.output) == "runs/both/una-lr=3e-05-seed=2"
    assert sweep.runs[0].settings.given.loss == "nll"


def test_overrides_hold_for_every_run() -> None:
    """After a run's own."""
    sweep_of(grid=None, runs=SWEEP["runs"][:2])
    runs = load_sweep("sweep.yaml", ("objective.loss=bce", "train.steps=3"))
    assert {planned.settings.given.loss for planned in runs.runs} == {"bce"}
    assert {planned.settings.train.steps for planned in runs.runs} == {3}


def test_a_recipe_over_a_grid() -> None:
    """--grid makes a sweep of one recipe, beside its own output."""
    sweep = grid_of("toy.yaml", ["train.lr=[1e-4,3e-5]", "objective.beta=[0.01]"], ("train.steps=5",))
    assert [planned.name for planned in sweep.runs] == ["toy-lr=0.0001-beta=0.01", "toy-lr=3e-05-beta=0.01"]
    assert str(sweep.runs[1].settings.output) == "runs/toy-sweep/toy-lr=3e-05-beta=0.01"
    assert sweep.runs[1].settings.train.steps == 5


@pytest.mark.parametrize("grid", [["train.lr"], ["train.lr=3"], ["train.lr=[]"], ["train.lr=[1"], ["a=[1]", "a=[2]"]])
def test_a_bad_grid_is_refused(grid: list[str]) -> None:
    """The message shows the form."""
    with pytest.raises(UserError, match=r"such as train.lr=\[1e-4,3e-5\]"):
        grid_of("toy.yaml", grid, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "sweep sweep.yaml: runs: [] given; list should have at least 1 item"),
        ({"rnus": []}, "sweep sweep.yaml: rnus: unknown key; did you mean 'runs'?"),
        ({"runs": [{"name": "a", "recpe": "toy.yaml"}]}, "runs.0.recpe: unknown key; did you mean 'recipe'?"),
        ({"runs": None} | RECIPE, "sweep sweep.yaml: this is a recipe; `uft train sweep.yaml` trains it once"),
        (
            {"runs": [SWEEP["runs"][0], SWEEP["runs"][1] | {"set": {"lora.rank": 8}}], "grid": None},
            "run una: lora.rank: 8 given, but it starts from the adapter of sft, whose lora.rank is 16",
        ),
        ({"runs": [{"name": "a/b", "recipe": "toy.yaml"}]}, "runs.0.name: 'a/b' given; string should match"),
        ({"runs": [{"name": "a", "recipe": "toy.yaml"}] * 2}, "sweep sweep.yaml: two runs are named 'a'"),
        (
            {"runs": [{"name": "a", "recipe": "toy.yaml", "after": "b"}, {"name": "b", "recipe": "toy.yaml"}]},
            "sweep sweep.yaml: a: after: no earlier run is named 'b'",
        ),
        ({"grid": {"train.sed": [1]}}, "toy.yaml: train.sed: unknown key; did you mean 'seed'?"),
        ({"runs": [{"name": "a", "recipe": "nothing"}]}, "run a-lr=0.0001-seed=1: recipe: "),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    """File and key, and every recipe of it is read."""
    with pytest.raises(UserError) as caught:
        sweep_of(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"grid": {"objective.beta": [1, 1.0]}}, (), "sft-beta=1 and sft-beta=1.0 are the same run"),
        (
            {"runs": [{"name": name, "recipe": "toy.yaml"} for name in "ab"], "grid": {"train.seed": [1]}},
            (),
            "a-seed=1 and b-seed=1 are the same run",
        ),
        ({"grid": {"train.lr": [1e-4, 1e-4]}}, (), "grid: two of its points would both be named sft-lr=0.0001"),
        ({"grid": {"model.base": ["a/b", "a_b"]}}, (), "would both be named sft-base=a_b"),
        ({}, ("train.seed=7",), "override 'train.seed=7': the grid varies train.seed"),
        ({}, ("train={seed: 7}",), "the grid varies train.lr"),
        ({}, ("name=x",), "override 'name=x': the sweep decides it"),
        ({"grid": {"output": ["a", "b"]}}, (), "grid: output: the sweep decides it"),
        (
            {"runs": [{"name": "a", "recipe": "toy.yaml", "set": {"train.lr": 1e-3}}]},
            (),
            "runs: a: set: train.lr: the grid varies train.lr for every run",
        ),
        ({"set": {"reference.adapter": "other"}}, (), "set: reference.adapter: the sweep decides it"),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], overrides: tuple[str, ...], message: str) -> None:
    """No two runs share a folder, and no override undoes the grid or what the sweep decides."""
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes))
    with pytest.raises(UserError) as caught:
        load_sweep("sweep.yaml", overrides)
    assert message in str(caught.value)


def test_nearby_values_have_names_of_their_own() -> None:
    """1e-5 and 1.0000001e-5 are two runs; a value too long for a file's name is numbered."""
    near = sweep_of(grid={"train.lr": [1e-5, 1.0000001e-5]}, runs=[{"name": "a", "recipe": "toy.yaml"}])
    assert [planned.name for planned in near.runs] == ["a-lr=1e-05", "a-lr=1.0000001e-05"]
    long = sweep_of(grid={"model.base": ["x" * 300, "y" * 300]}, runs=[{"name": "a", "recipe": "toy.yaml"}])
    assert [planned.name for planned in long.runs] == ["a-1", "a-2"]
    assert long.runs[1].settings.model.base == "y" * 300


def test_output_moves_the_sweep() -> None:
    """An override of it is the sweep's folder, not each run's."""
    sweep_of(grid=None)
    moved = load_sweep("sweep.yaml", ("output=elsewhere",))
    assert [str(planned.settings.output) for planned in moved.runs] == [
        "elsewhere/sft", "elsewhere/una", "elsewhere/uft",
    ]  # fmt: skip
    assert grid_of("toy.yaml", ["train.seed=[1]"], ("output=x",)).output == Path("x")


@pytest.mark.parametrize("given", ["output=[", "output=", "output=3", "output=[a]", "output={a: 1, a: 2}"])
def test_an_output_that_is_no_folder_is_refused(given: str) -> None:
    """By the override, as the recipe's own key would be; none makes a folder called None."""
    sweep_of(grid=None)
    with pytest.raises(UserError, match=rf"^override '{re.escape(given)}': expected a folder"):
        load_sweep("sweep.yaml", (given,))


def test_values_of_all_runs() -> None:
    """`set` of the sweep holds for every run, before its own."""
    sweep = sweep_of(grid=None, set={"objective.loss": "bce", "train.steps": 9})
    found = [planned.settings for planned in sweep.runs]
    assert [settings.given.loss for settings in found] == ["nll", "bce", "bce"]
    assert {settings.train.steps for settings in found} == {9}


def test_a_grid_of_a_sweep_is_refused() -> None:
    """A shipped one's or a file's."""
    sweep_of()
    for name in ("sweep.yaml", "baselines_mistral7b", "lr_beta_mistral7b"):
        with pytest.raises(UserError, match=f"--grid: {name} is a sweep, not a recipe"):
            grid_of(name, ["train.lr=[1e-4]"], ())


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


def test_spelling_makes_no_other_base() -> None:
    """Of a folder, or of the order of modules."""
    Path("models/m").mkdir(parents=True)
    stages = [
        {"name": "a", "recipe": "toy.yaml", "set": {"model.base": "models/m", "lora.targets": ["q", "k"]}},
        {
            "name": "b",
            "recipe": "toy.yaml",
            "after": "a",
            "set": {"model.base": "./models/m", "lora.targets": ["k", "q"]},
        },
    ]
    assert len(sweep_of(runs=stages, grid=None).runs) == 2


def test_an_unknown_sweep_lists_the_shipped_ones() -> None:
    """And says how to sweep a recipe."""
    with pytest.raises(UserError, match=r"no such file; shipped: baselines_mistral7b, lr_beta_mistral7b; .*--grid"):
        load_sweep("toy")


def test_the_shipped_sweep_is_whole() -> None:
    """Six methods; the second stages start from the first."""
    sweep = load_sweep("baselines_mistral7b", ("model.chat_template=t.jinja",))
    adapters = {planned.name: planned.settings.reference.adapter for planned in sweep.runs}
    first = "runs/baselines_mistral7b/sft"
    assert adapters == {"sft": None, "sft_dpo": first, "sft_kto": first, "sft_una": first, "una": None, "uft": None}


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
    with pytest.raises(UserError, match=r"uft: holds a run of another recipe \(train.lr: 0.5 now, 3e-05 then\)"):
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
        with pytest.raises(UserError, match=r"una: holds a run of another recipe \(train.lr: 0.5 now, 3e-05 then\)"):
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
    how_far = "step 0, newest checkpoint none: rank 1 was killed"
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
