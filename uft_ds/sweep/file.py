"""Read a sweep: a list of runs, each a recipe with overrides, repeated for every point of a grid of values."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from uft_ds.errors import UserError
from uft_ds.recipe.explaining import explained
from uft_ds.recipe.file import dump_value, load_recipe, load_yaml, read_yaml_file, said
from uft_ds.recipe.section import Location, Section
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, settings_of

DEFAULT_COLUMNS = (
    "held_out/loss", "held_out/rank_correlation/*", "held_out/pair_accuracy/*", "held_out/calibration_error/*",
)  # fmt: skip

_LONGEST_SUFFIX = 120
"""Longest part of a run's name that lists the grid's values, in letters; longer ones are replaced by a number."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class StageSection(Section):
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    """Name of the run and of its folder."""
    recipe: Location
    """Name of a shipped recipe, or path of a YAML file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the recipe, by key."""
    after: str | None = None
    """Name of an earlier run that must be done first; its adapter is this run's start and reference."""


class SweepSection(Section):
    name: str
    """Name of the sweep."""
    runs: Annotated[list[StageSection], Field(min_length=1)]
    """In the order in which they are run."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of every run; a run's own overrides take precedence."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Every run is repeated with each combination of these keys' values."""
    columns: list[str] = Field(default_factory=lambda: list(DEFAULT_COLUMNS))
    """Metrics shown in the table, by name or pattern; the CSV file holds all metrics."""
    output: Location
    """The folder that contains the runs' folders."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    stage: name of its entry in `runs`. values: (key, value) of its point of the grid. after: name of the previous run.
    settings: with the sweep's overrides; if there is a previous run, its folder is `reference.adapter`.
    """

    name: str
    stage: str
    values: tuple[tuple[str, Any], ...]
    settings: Settings
    after: str | None

    @property
    def settings_alone(self) -> Settings:
        """The settings without the adapter of the previous run, which may not exist yet."""
        return self.settings if self.after is None else changed(self.settings, {"reference.adapter": None})


@dataclass(frozen=True)
class Sweep:
    name: str
    output: Path
    columns: tuple[str, ...]
    runs: tuple[PlannedRun, ...]


def load_sweep(path: str, overrides: tuple[str, ...] = ()) -> Sweep:
    """Read a sweep (a file, or a shipped one by its name) and check each of its recipes.

    Args:
        overrides: for every run; they take precedence over the run's own.
    Raises:
        UserError: names the file and the key.
    """
    tree = _read_tree(path)
    if "runs" not in tree and {"model", "data"} & tree.keys():
        raise UserError(
            f"sweep {path}: this is a recipe; `uft train {path}` trains it once, --grid key=[value,value] sweeps it"
        )
    try:
        section = SweepSection.model_validate(tree)
    except ValidationError as error:
        problems = explained(error, SweepSection)
        raise UserError("\n".join(f"sweep {path}: {problem}" for problem in problems)) from None
    return _planned(section, overrides, f"sweep {path}")


def grid_of(recipe: str, grid: Iterable[str], overrides: tuple[str, ...]) -> Sweep:
    """A sweep of one recipe over `key=[value, ...]`.

    Raises:
        UserError: names what cannot be read.
    """
    values: dict[str, list[Any]] = {}
    for entry in grid:
        key, separator, text = entry.partition("=")
        try:
            found = load_yaml(text) if separator else None
        except (yaml.YAMLError, UserError):
            found = None
        if not isinstance(found, list) or not found or key in values:
            raise UserError(
                f"--grid {entry!r}: expected each key once, as key=[value, value], such as train.lr=[1e-4,3e-5]"
            )
        values[key] = found
    if recipe in _shipped_sweeps() or (Path(recipe).is_file() and "runs" in _read_tree(recipe)):
        raise UserError(f"--grid: {recipe} is a sweep, not a recipe; give its own `grid` the keys")
    base = load_recipe(recipe, overrides)
    stage = StageSection(name=base.name if re.fullmatch(NAME, base.name) else "run", recipe=recipe)
    rest = tuple(override for override in overrides if not override.startswith("output="))
    output = base.output if rest != overrides else f"{base.output}-sweep"
    section = SweepSection(name=base.name, runs=[stage], grid=values, output=output)
    overrides = rest
    return _planned(section, overrides, f"sweep of {recipe}")


def _read_tree(path: str) -> dict[str, Any]:
    shipped = _shipped_sweeps()
    try:
        is_shipped = path in shipped
        text = shipped[path].read_text("utf-8") if is_shipped else read_yaml_file(Path(path), f"sweep {path}", shipped)
    except UserError as error:
        hint = "" if Path(path).exists() else "; for a recipe give --grid key=[value,value]"
        raise UserError(f"{error}{hint}") from None
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"sweep {path}{f':{mark.line + 1}' if mark else ''}: not valid YAML") from None
    except UserError as error:
        raise UserError(f"sweep {path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"sweep {path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _shipped_sweeps() -> dict[str, Traversable]:
    folder = resources.files("uft_ds") / "sweep" / "shipped"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def _planned(section: SweepSection, overrides: tuple[str, ...], label: str) -> Sweep:
    runs: list[PlannedRun] = []
    known: set[str] = set()
    _check_keys(section, overrides, label)
    for stage in section.runs:
        if stage.name in known:
            raise UserError(f"{label}: two runs are named {stage.name!r}")
        if stage.after is not None and stage.after not in known:
            raise UserError(f"{label}: {stage.name}: after: no earlier run is named {stage.after!r}")
        known.add(stage.name)
    output, overrides = _output_of(section, overrides)
    for number, values in enumerate(itertools.product(*section.grid.values()), start=1):
        point = tuple(zip(section.grid, values, strict=True))
        suffix = "".join(f"-{key.rsplit('.', 1)[-1]}={_shown(value)}" for key, value in point)
        if len(suffix) > _LONGEST_SUFFIX:
            suffix = f"-{number}"
        for stage in section.runs:
            own = tuple(_override(*item) for item in (*section.set.items(), *stage.set.items(), *point))
            try:
                runs.append(_planned_run(stage, suffix, point, (*own, *overrides), output))
            except UserError as error:
                raise UserError(f"{label}: run {stage.name + suffix}: {error}") from None
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{label}: grid: two of its points would both be named {twice}; is a value there twice?")
    _check_stages_fit(runs, label)
    _check_runs_differ(runs, label)
    return Sweep(section.name, output, tuple(section.columns), tuple(runs))


def _planned_run(
    stage: StageSection, suffix: str, point: tuple[tuple[str, Any], ...], overrides: tuple[str, ...], output: Path
) -> PlannedRun:
    name, after = stage.name + suffix, None if stage.after is None else stage.after + suffix
    located = {"name": name, "output": str(output / name)}
    if after is not None:
        located["reference.adapter"] = str(output / after)
    recipe = load_recipe(stage.recipe, (*overrides, *(_override(*item) for item in located.items())))
    return PlannedRun(name, stage.name, point, settings_of(recipe), after)


def _check_stages_fit(runs: list[PlannedRun], label: str) -> None:
    """Refuse a run whose base or LoRA settings differ from those of the run whose adapter it starts from."""
    trees = {run.name: run.settings.stored for run in runs}
    for run in runs:
        if run.after is None:
            continue
        first, second = trees[run.after], run.settings.stored
        if first["lora"] is None or second["lora"] is None:
            which = run.after if first["lora"] is None else run.name
            raise UserError(
                f"{label}: run {run.name}: it starts from the adapter of {run.after}, but {which} has lora: null, so "
                "none; leave `after` out, or train adapters in both"
            )
        for key in ("model.base", "model.revision", "lora.rank", "lora.alpha", "lora.targets", "lora.experts"):
            section, name = key.split(".")
            before, now = first[section][name], second[section][name]
            if _meaning(before) != _meaning(now):
                raise UserError(
                    f"{label}: run {run.name}: {key}: {said(now)} given, but it starts from the adapter of "
                    f"{run.after}, whose {key} is {said(before)}"
                )


def _meaning(value: Any) -> Any:
    """A value in a form that compares equal if only the order of names or the spelling of a path differs."""
    if isinstance(value, list):
        return sorted(set(value))
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value


def _check_runs_differ(runs: list[PlannedRun], label: str) -> None:
    """Refuse two equal runs, for example if the grid lists 1 and 1.0, or a default value explicitly."""
    seen: dict[str, str] = {}
    for run in runs:
        what = json.dumps({**run.settings.stored, "name": "", "output": ""})
        if what in seen:
            raise UserError(f"{label}: {seen[what]} and {run.name} are the same run")
        seen[what] = run.name


def _check_keys(section: SweepSection, overrides: tuple[str, ...], label: str) -> None:
    """Refuse keys that the sweep itself sets, and overrides of keys that the grid varies."""
    given = {
        **{f"set: {key}": key for key in section.set},
        **{f"runs: {stage.name}: set: {key}": key for stage in section.runs for key in stage.set},
        **{f"grid: {key}": key for key in section.grid},
        **{f"override {override!r}": override.partition("=")[0] for override in overrides if override[:7] != "output="},
    }
    chained = any(stage.after is not None for stage in section.runs)
    owned = {"name", "output"} | ({"reference.adapter"} if chained else set())
    for place, key in given.items():
        if any(_overlap(key, of_sweep) for of_sweep in owned):
            raise UserError(f"{label}: {place}: the sweep decides it, by each run's name and `after`")
    for stage in section.runs:
        for key, of_grid in itertools.product(stage.set, section.grid):
            if _overlap(key, of_grid):
                raise UserError(f"{label}: runs: {stage.name}: set: {key}: the grid varies {of_grid} for every run")
    for override in overrides:
        key = override.partition("=")[0]
        for of_grid in section.grid:
            if _overlap(key, of_grid):
                raise UserError(f"{label}: override {override!r}: the grid varies {of_grid}; change the grid")


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _output_of(section: SweepSection, overrides: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """The sweep's folder, and the overrides of its runs: `output=` changes the folder of the whole sweep.

    Raises:
        UserError: the value of `output=` is no folder.
    """
    given = [override for override in overrides if override.startswith("output=")]
    rest = tuple(override for override in overrides if not override.startswith("output="))
    if not given:
        return Path(section.output).expanduser(), rest
    try:
        folder = load_yaml(given[-1].partition("=")[2])
    except (yaml.YAMLError, UserError):
        folder = None
    if not isinstance(folder, str) or not folder:
        raise UserError(f"override {given[-1]!r}: expected a folder, such as output=runs/other")
    return Path(folder).expanduser(), rest


def _override(key: str, value: Any) -> str:
    return f"{key}={dump_value(value)}"


def _shown(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(value))
