"""The recipe as plain values: what is made of it, and that nothing else reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import uft_ds
from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.recipe.file import dump_recipe, load_recipe, shipped_recipes
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, load_settings, settings_of
from uft_ds.run.settings import located

READERS = {
    "commands/recipe.py",
    "recipe/combinations.py",
    "recipe/described.py",
    "recipe/file.py",
    "recipe/online.py",
    "recipe/to_settings.py",
}
"""Modules that may import the recipe's tree."""


def test_nothing_below_reads_the_recipe() -> None:
    """The schema is imported by the modules that read, resolve or describe it, and by no other."""
    package = Path(uft_ds.__file__).parent
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "uft_ds.recipe.schema" in imports(path)
    }
    assert found == READERS


def imports(path: Path) -> set[str]:
    return {
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_is_stored_is_the_recipe(name: str) -> None:
    """recipe.yaml is the same text as that of the recipe itself, and gives the same settings when it is read back."""
    recipe = load_recipe(name)
    settings = settings_of(recipe)
    assert dump_recipe(settings.stored) == dump_recipe(recipe)
    assert changed(settings, {}) == settings


def test_a_change_reaches_the_value_and_what_is_stored(minimal: str) -> None:
    """One value by its key, the others as they were; what the recipe names itself stays what it was."""
    before = load_settings(minimal)
    after = changed(before, {"data.sources.1.path": "c.jsonl", "output": "elsewhere"})
    assert [source.path for source in after.data.sources] == ["a.jsonl", "c.jsonl"]
    assert (after.stored["data"]["sources"][1]["path"], after.output) == ("c.jsonl", Path("elsewhere"))
    assert after.given.named == before.given.named == frozenset()
    assert changed(after, {"data.sources.1.path": "b.jsonl", "output": str(before.output)}) == before


def test_a_source_is_the_same_wherever_the_recipe_names_it(minimal: str) -> None:
    """The key of its entry is for messages: it tells no two sources apart."""
    as_the_first = {"format": "jsonl", "path": "a.jsonl", "examples": None}
    changes = {f"data.sources.1.{key}": value for key, value in as_the_first.items()}
    one, other = changed(load_settings(minimal), changes).data.sources
    assert (one.recipe_key, other.recipe_key) == ("data.sources.0", "data.sources.1")
    assert one == other


def test_a_change_is_checked(minimal: str) -> None:
    """As the recipe itself is."""
    with pytest.raises(UserError, match=r"train\.lr: -1 given"):
        changed(load_settings(minimal), {"train.lr": -1})


def test_a_reference_that_no_loss_needs_is_neither_cached_nor_in_lockstep(minimal: str) -> None:
    """Whatever the recipe says of it."""
    found = [
        (settings.reference.is_needed, settings.reference.caches, settings.reference.mode)
        for settings in (load_settings(minimal, (f"objective.loss={loss}",)) for loss in ("mse", "nll"))
    ]
    assert found == [(True, True, "lockstep"), (False, False, "separate")]


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        ((), False),
        (("reference.cache=false",), True),
        (("objective.reward_shift=kl",), True),
        (("objective.reward_shift=ema",), False),
        (("data.sources.0={format: prompts, path: p.jsonl, answers: 2, score_by: 'code:m:f'}",), True),
        (("objective.loss=nll", "reference.cache=false"), False),
    ],
)
def test_a_copy_of_the_base_is_made_where_steps_forward_the_reference(
    minimal: str, overrides: tuple[str, ...], copies: bool
) -> None:
    """Of all parameters trained; the reference of adapters is their own base."""
    assert load_settings(minimal, ("lora=null", *overrides)).copies_reference == copies
    assert not load_settings(minimal, overrides).copies_reference


def in_folder(minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The minimal recipe where one of its two sources is there."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    return load_settings(minimal, ("data.cache_dir=cache",))


def test_paths_are_absolute_wherever_they_are_kept(
    minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of local files in the values and in what is stored alike; what is not there keeps its name, as hub names do."""
    found = located(in_folder(minimal, tmp_path, monkeypatch))
    assert [source.path for source in found.data.sources] == [str(tmp_path / "a.jsonl"), "b.jsonl"]
    assert [source["path"] for source in found.stored["data"]["sources"]] == [str(tmp_path / "a.jsonl"), "b.jsonl"]
    assert (found.data.cache_dir, found.output) == (tmp_path / "cache", tmp_path / "runs" / "small")
    assert (found.model.base, found.deepspeed.name) == ("some/model", "zero3")


def test_two_spellings_of_a_path_are_told_by_their_content(
    minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making paths absolute does not refuse what the recipe itself allowed."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    found = located(load_settings(minimal, ("data.sources.1.path=./a.jsonl",)))
    assert {source.path for source in found.data.sources} == {str(tmp_path / "a.jsonl")}


def test_locating_twice_changes_nothing(minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another folder."""
    once = located(in_folder(minimal, tmp_path, monkeypatch))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert located(once) == once


def test_the_deepspeed_file_is_read_once(minimal: str, tmp_path: Path) -> None:
    """Its content goes with the settings: the file may be gone by then, and other changes do not lose it."""
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    settings = with_deepspeed_file(load_settings(minimal, (f"deepspeed={file}",)))
    file.unlink()
    later = changed(with_deepspeed_file(settings), {"name": "later"})
    assert later.deepspeed.checked == {"zero_optimization": {"stage": 2}}
    with pytest.raises(AssertionError):
        _ = changed(later, {"deepspeed": "zero3"}).deepspeed.checked
