"""`start.adapter` before a launch: what is refused by name, what is recorded, and that it is the same at each start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import settings_of_run, write_recipe
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from toy import saved_adapter

from uft_ds.checkpoint.folder import ADAPTER, name_of
from uft_ds.errors import UserError
from uft_ds.recipe.to_settings import changed, load_settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.checks import check_adapters_are_of_base
from uft_ds.run.identity import owner, run_identity
from uft_ds.run.prepare import prepare_run
from uft_ds.run.start_adapter import read_start
from uft_ds.streams.identity import base_identity


@pytest.fixture(scope="module")
def adapter(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tiny_qwen2, tmp_path_factory.mktemp("start") / "adapter")


def prepared(recipe: Path, *overrides: str) -> RunFolder:
    folder, _, lock = prepare_run(settings_of_run(recipe, *overrides), overwrite=False)
    lock.close()
    return folder


def refused(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(recipe, *overrides)
    assert not (recipe.parent / "run").exists()
    return str(caught.value)


def test_what_it_must_compute_is_recorded(tiny_qwen2: Path, adapter: Path, tmp_path: Path) -> None:
    """A log-ratio for each response of the sample, which is not that of no adapter; its content is in the identity
    and the environment."""
    folder = prepared(write_recipe(tmp_path, tiny_qwen2, start={"adapter": str(adapter)}))
    found = read_start(folder)
    assert len(found.log_ratios) == 5
    assert max(map(abs, found.log_ratios)) > 0.05
    identity = json.loads(folder.identity.read_text())
    assert identity["start"] == found.adapter == json.loads(folder.environment.read_text())["start_adapter"]
    assert identity["adapter"] is None, "the reference is the base"


def test_names_of_others_are_mapped(tiny_qwen2: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT itself would load none of them, without a word: the same log-ratios."""
    foreign = tmp_path / "foreign"
    shutil.copytree(adapter, foreign)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
        foreign / "adapter_model.safetensors",
    )
    recipe = write_recipe(tmp_path, tiny_qwen2)
    ours, theirs = (
        prepared(recipe, f"start.adapter={path}", f"output={tmp_path / name}")
        for name, path in (("a", adapter), ("b", foreign))
    )
    assert read_start(ours).log_ratios == read_start(theirs).log_ratios


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start.adapter=nowhere"], "start.adapter: nowhere: no such folder; expected an adapter's folder"),
        (["start.adapter=."], "start.adapter: .: holds no adapter"),
        (["lora.rank=8"], "r is 4, expected 8 (lora.rank)"),
        (["lora.alpha=16.0"], "lora_alpha is 8.0, expected 16.0 (lora.alpha)"),
        (["lora.targets=[q_proj]"], "the policy has no adapter there; lora.targets must name the same layers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_qwen2: Path, adapter: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """By the key's own name, with what was found and expected."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    found = refused(recipe, f"start.adapter={adapter}", *overrides)
    assert found.startswith("start.adapter: ")
    assert message in found


def test_an_adapter_of_another_base_is_refused(tiny_qwen2: Path, adapter: Path, tmp_path: Path) -> None:
    """By name, where nothing else is known."""
    other = build_tiny_model(tmp_path / "other", seed=7)
    found = refused(write_recipe(tmp_path, other), f"start.adapter={adapter}")
    assert found.startswith(f"start.adapter: {adapter} was trained on {tiny_qwen2}, model.base is {other}")


@pytest.mark.parametrize("key", ["start.adapter", "reference.adapter"])
def test_a_base_that_has_changed_in_its_place_is_refused(
    tiny_qwen2: Path, adapter: Path, tmp_path: Path, key: str
) -> None:
    """The name is still that of the adapter's config; the run that trained the adapter recorded the content."""
    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    run = RunFolder(tmp_path / "trained")
    kept = run.checkpoints / name_of(4) / ADAPTER
    shutil.copytree(adapter, kept)
    config = json.loads((kept / "adapter_config.json").read_text())
    (kept / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    run.identity.write_text(json.dumps({"base": base_identity(str(base), None)}))
    settings = changed(load_settings(str(write_recipe(tmp_path, base))), {key: str(kept)})
    check_adapters_are_of_base(settings, lambda done, total: None)
    shutil.copyfile(build_tiny_model(tmp_path / "other", seed=7) / "model.safetensors", base / "model.safetensors")
    with pytest.raises(UserError, match=rf"^{key}: .* of the run .*, which was trained on a base of other content"):
        check_adapters_are_of_base(settings, lambda done, total: None)


def test_two_starts_are_refused(tiny_qwen2: Path, adapter: Path, tmp_path: Path) -> None:
    """`reference.adapter` starts the policy too."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    assert "start.adapter: given together with reference.adapter" in refused(
        recipe, f"start.adapter={adapter}", f"reference.adapter={adapter}"
    )


@pytest.mark.parametrize("content", ["", "[]", '{"adapter": "a"}', '{"adapter": "a", "log_ratios": [1.0]}'])
def test_a_damaged_record_is_named(tiny_qwen2: Path, adapter: Path, tmp_path: Path, content: str) -> None:
    """Each start of the run reads it."""
    folder = prepared(write_recipe(tmp_path, tiny_qwen2, start={"adapter": str(adapter)}))
    folder.start().write_text(content)
    with pytest.raises(UserError, match=rf"^{folder.start()}: cannot be read"):
        read_start(folder)


def test_the_start_is_part_of_who_a_run_is(tiny_qwen2: Path, adapter: Path, tmp_path: Path) -> None:
    """By content, wherever it lies; without one, the identity is that of versions that knew no start."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    _, data, lock = prepare_run(settings_of_run(recipe), overwrite=False)
    lock.close()

    def of(**start: Any) -> Any:
        settings = changed(settings_of_run(recipe), {f"start.{key}": str(value) for key, value in start.items()})
        identity = run_identity(settings, data, lambda label, done, total: None)
        return identity, owner(settings, identity)

    assert of(adapter=adapter)[1] == of(adapter=moved)[1] != of()[1]
    assert "start" not in of()[0]
