"""A sweep: what it plans, what it runs again, what stops, and its table. The runs themselves are stood in for."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from uft_ds.errors import EXIT_INTERRUPTED, UserError
from uft_ds.files import write_atomically
from uft_ds.recipe import Recipe
from uft_ds.recipe_file import dump_recipe
from uft_ds.resolve import with_absolute_paths
from uft_ds.sweep import Result, last_values, run_sweep
from uft_ds.sweep_file import Sweep, grid_of, load_sweep, recipe_of
from uft_ds.training.run_folder import RunFolder, Status

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


class Trainer:
    """Stands for a launch: leaves what a run leaves, or fails where it is told to."""

    def __init__(self, **exit_codes: int) -> None:
        self.exit_codes, self.trained = exit_codes, list[str]()

    def __call__(self, recipe: Recipe, overwrite: bool) -> tuple[Path, Status]:
        folder = RunFolder(Path(recipe.output))
        self.trained.append(recipe.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        Path("latest").mkdir(exist_ok=True)
        write_atomically(folder.recipe, dump_recipe(with_absolute_paths(recipe)))
        code = self.exit_codes.get(recipe.name.split("-")[0], 0)
        if code == 2:
            raise UserError("a bad row")
        if code == 0:
            lines = [{"step": 1, "loss": 1.0, "held_out/loss": 0.5}, {"step": 2, "loss": recipe.train.lr, "x": None}]
            folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            folder.done.touch()
        return folder.path, Status(code, "")


def run(sweep: Sweep, trainer: Trainer, *, overwrite: bool = False) -> list[Result]:
    return run_sweep(sweep, Console(file=io.StringIO()), train=trainer, overwrite=overwrite)


@pytest.fixture
def no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins leave no adapter."""
    monkeypatch.setattr("uft_ds.resolve.adapter_folder", Path)


def test_a_grid_repeats_every_run_with_every_combination() -> None:
    """Three runs times two learning rates times two seeds, a point of the grid after the other."""
    sweep = sweep_of()
    assert [planned.name for planned in sweep.runs[:4]] == [
        "sft-lr=0.0001-seed=1", "una-lr=0.0001-seed=1", "uft-lr=0.0001-seed=1", "sft-lr=0.0001-seed=2",
    ]  # fmt: skip
    assert len(sweep.runs) == len({planned.name for planned in sweep.runs}) == 12
    recipe = recipe_of(sweep, sweep.runs[-2])
    assert (recipe.train.lr, recipe.train.seed, recipe.objective.loss) == (3e-5, 2, "mse")
    assert recipe.reference.adapter == "runs/both/sft-lr=3e-05-seed=2", "the first stage of the same point"
    assert recipe.output == "runs/both/una-lr=3e-05-seed=2"
    assert recipe_of(sweep, sweep.runs[0]).objective.loss == "nll"


def test_overrides_hold_for_every_run() -> None:
    """After a run's own."""
    sweep_of(grid=None)
    runs = load_sweep("sweep.yaml", ("objective.loss=bce", "train.steps=3"))
    assert {recipe_of(runs, planned).objective.loss for planned in runs.runs} == {"bce"}
    assert {recipe_of(runs, planned).train.steps for planned in runs.runs} == {3}


def test_a_recipe_over_a_grid() -> None:
    """--grid makes a sweep of one recipe, beside its own output."""
    sweep = grid_of("toy.yaml", ["train.lr=[1e-4,3e-5]", "objective.beta=[0.01]"], ("train.steps=5",))
    assert [planned.name for planned in sweep.runs] == ["toy-lr=0.0001-beta=0.01", "toy-lr=3e-05-beta=0.01"]
    assert recipe_of(sweep, sweep.runs[1]).output == "runs/toy-sweep/toy-lr=3e-05-beta=0.01"
    assert recipe_of(sweep, sweep.runs[1]).train.steps == 5


@pytest.mark.parametrize("grid", [["train.lr"], ["train.lr=3"], ["train.lr=[]"], ["train.lr=[1"], ["a=[1]", "a=[2]"]])
def test_a_bad_grid_is_refused(grid: list[str]) -> None:
    """The message shows the form."""
    with pytest.raises(UserError, match=r"such as train.lr=\[1e-4,3e-5\]"):
        grid_of("toy.yaml", grid, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "sweep sweep.yaml: runs: list should have at least 1 item"),
        ({"rnus": []}, "sweep sweep.yaml: rnus: "),
        ({"runs": [{"name": "a/b", "recipe": "toy.yaml"}]}, "sweep sweep.yaml: runs.0.name: string should match"),
        ({"runs": [{"name": "a", "recipe": "toy.yaml"}] * 2}, "sweep sweep.yaml: two runs are named 'a'"),
        (
            {"runs": [{"name": "a", "recipe": "toy.yaml", "after": "b"}, {"name": "b", "recipe": "toy.yaml"}]},
            "sweep sweep.yaml: a: after: no run named 'b' stands before it",
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


def test_an_unknown_sweep_lists_the_shipped_ones() -> None:
    """And says how to sweep a recipe."""
    with pytest.raises(UserError, match=r"no such file; shipped: baselines_mistral7b; .*--grid"):
        load_sweep("toy")


def test_the_shipped_sweep_is_whole() -> None:
    """Six methods; the second stages start from the first."""
    sweep = load_sweep("baselines_mistral7b", ("model.chat_template=t.jinja",))
    adapters = {planned.name: recipe_of(sweep, planned).reference.adapter for planned in sweep.runs}
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
def test_a_done_run_of_another_recipe_is_refused() -> None:
    """Its numbers would stand in the table as those of this one."""
    run(sweep_of(grid=None), Trainer())
    trainer = Trainer()
    changed = [*SWEEP["runs"][:2], {"name": "uft", "recipe": "toy.yaml", "set": {"train.lr": 0.5}}]
    with pytest.raises(UserError, match=r"uft: holds a run of another recipe \(train.lr: 0.5 now, 3e-05 then\)"):
        run(sweep_of(grid=None, runs=changed), trainer)
    assert not trainer.trained


@pytest.mark.parametrize("code", [1, 2, 3])
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
def test_an_interruption_ends_the_sweep() -> None:
    """Ctrl-C means all of it."""
    trainer = Trainer(una=EXIT_INTERRUPTED)
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
    assert [row["train.lr"] for row in rows] == ["0.0001"] * 3 + ["3e-05"] * 3


def test_last_values_are_the_last_that_are_numbers(tmp_path: Path) -> None:
    """A null does not hide what was before it."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1, "a": 1.0, "b": 2.0}\n{"step": 2, "a": null, "b": 3.0}\n')
    assert last_values(folder) == {"step": 2, "a": 1.0, "b": 3.0}
