"""`model.gradient_checkpointing: auto` on ranks: all take one mode, by the rank that has the least memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Heard
from ranks import run_on_ranks
from runs import uft, write_recipe

from uft_ds.errors import UserError
from uft_ds.planning.hardware import GB
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.run import recompute


def chosen(recipe: Path, cases: list[list[int]]) -> list[tuple[object, list[str]]]:
    """Of each case, which is the memory of every rank."""
    settings = load_settings(str(recipe), ("model.gradient_checkpointing=auto",))
    found: list[tuple[object, list[str]]] = []
    for memories in cases:
        heard = Heard()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                recompute, "_memory_bytes", lambda memories=memories: memories[torch.distributed.get_rank()]
            )
            mode = recompute.with_chosen_recompute(settings, heard).model.gradient_checkpointing
        found.append((mode, heard.said))
    return found


@pytest.mark.long
def test_the_rank_with_the_least_memory_decides(tiny_qwen2: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_qwen2)
    modes, memories = (False, True, True), [[64 * GB, 64 * GB], [64 * GB, GB], [GB, 64 * GB]]
    for of_rank in run_on_ranks(chosen, 2, recipe, memories):
        for (took, (said,)), mode in zip(of_rank, modes, strict=True):
            assert took == mode
            assert f"auto takes {str(mode).lower()}, with which 2 ranks together need about" in said


def refused(recipe: Path, error: Exception) -> tuple[str, object]:
    def plan(*_: object) -> None:
        raise error

    heard = Heard()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recompute, "chosen_recompute", plan)
        settings = load_settings(str(recipe), ("model.gradient_checkpointing=auto",))
        try:
            mode = recompute.with_chosen_recompute(settings, heard).model.gradient_checkpointing
        except UserError as told:
            return str(told), None
        return heard.said[0], mode


def test_an_error_of_the_plan_is_everyones(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Bad input is refused on all ranks at once; a model that cannot be planned takes what needs the least memory."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    assert run_on_ranks(refused, 2, recipe, UserError("no config")) == [("no config", None)] * 2
    for said, mode in run_on_ranks(refused, 2, recipe, TypeError("unknown layer")):
        assert mode is True
        assert said.endswith("auto takes true, because this model cannot be planned (unknown layer)")


@pytest.mark.long
def test_a_run_that_chooses_is_the_run_that_was_told(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The same losses bit for bit; the choice is said, and the recipe that is stored still says auto."""
    losses = {}
    for mode in ("auto", "false"):
        (tmp_path / mode).mkdir()
        recipe = write_recipe(tmp_path / mode, tiny_qwen2)
        result = uft("train", str(recipe), f"model.gradient_checkpointing={mode}")
        assert result.returncode == 0, result.stdout + result.stderr
        assert ("model.gradient_checkpointing: auto takes false" in " ".join(result.stdout.split())) == (mode == "auto")
        losses[mode] = [line.get("loss") for line in read_metrics(tmp_path / mode / "run" / "metrics.jsonl")]
        assert f"gradient_checkpointing: {mode}" in (tmp_path / mode / "run" / "recipe.yaml").read_text()
    assert losses["auto"] == losses["false"]
