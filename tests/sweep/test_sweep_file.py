"""A sweep's file: the runs that it plans, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import RECIPE, SWEEP, sweep_of

from uft_ds.errors import UserError
from uft_ds.sweep.file import grid_of, load_sweep


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
        (
            {"runs": [SWEEP["runs"][0] | {"set": {"lora": None}}, SWEEP["runs"][1]], "grid": None},
            "run una: it starts from the adapter of sft, but sft has lora: null, so none",
        ),
        ({"runs": [{"name": "a/b", "recipe": "toy.yaml"}]}, "runs.0.name: 'a/b' given; string should match"),
        ({"runs": [{"name": "a", "recipe": "toy.yaml"}] * 2}, "sweep sweep.yaml: two runs are named 'a'"),
        (
            {"runs": [{"name": "a", "recipe": "toy.yaml", "after": "b"}, {"name": "b", "recipe": "toy.yaml"}]},
            "sweep sweep.yaml: a: after: no earlier run is named 'b'",
        ),
        ({"grid": {"lr": [1]}}, "toy.yaml: lr: unknown key; did you mean 'train.lr'?"),
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
