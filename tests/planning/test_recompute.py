"""`model.gradient_checkpointing: auto`, by hand: the fastest mode whose planned memory fits, with a tenth to spare."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_recipe
from tiny import build_tiny_model

from uft_ds.planning.hardware import GB, Figures, cluster_of
from uft_ds.planning.here import Chosen, Place, chosen_recompute, memory_note
from uft_ds.planning.plan import make_plan
from uft_ds.planning.planner import Planner
from uft_ds.planning.shapes import shipped_config
from uft_ds.recipe.settings import load_settings

MODES = ("false", "selective", "true")


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(shipped_config("Mistral-7B-v0.1"))


def test_a_plan_takes_the_fastest_mode_that_fits(planner: Planner) -> None:
    """Just enough memory for each mode, and a byte less; and the plan says which one it took."""

    def planned(mode: str, gpu_memory_gb: float) -> tuple[str, int, str]:
        settings = load_settings("uft_mistral7b", (f"model.gradient_checkpointing={mode}",))
        figures = Figures(gpu_memory=gpu_memory_gb, host_memory=2000, network_gbits=400)
        plan = make_plan(settings, cluster_of(nodes=1, gpus=8, gpu="h100", figures=figures), planner=planner)
        took = plan.outcome.setting.workload.gradient_checkpointing
        return str(took).lower(), plan.outcome.gpu.total_bytes, " ".join(plan.assumptions)

    needed = [planned(mode, 80.0)[1] for mode in MODES]
    assert needed[0] > needed[1] > needed[2], "the modes should differ in this recipe"
    for mode, enough, less in zip(MODES, needed, ("selective", "true", "true"), strict=True):
        for memory_bytes, expected in ((enough * 1.101, mode), (enough * 1.099, less)):
            took, planned_bytes, said = planned("auto", memory_bytes / GB)
            assert took == expected
            assert planned_bytes == pytest.approx(needed[MODES.index(expected)], rel=0.01)
            assert f"auto takes {expected} on these GPUs" in said
    assert "auto takes" not in planned("true", 80.0)[2]


def test_a_machine_takes_the_fastest_mode_that_fits(tmp_path: Path) -> None:
    """Two ranks that share the memory of a machine without GPUs."""
    base = build_tiny_model(tmp_path / "base")
    recipe = write_recipe(tmp_path, base, data__max_length=512, train__tokens_per_micro_batch=8192)

    def chosen(mode: str, memory_bytes: float) -> Chosen:
        settings = load_settings(str(recipe), (f"model.gradient_checkpointing={mode}",))
        return chosen_recompute(settings, Place(1, 2, False, int(memory_bytes)))

    everything, some = (chosen(mode, 0).needed_bytes for mode in ("false", "selective"))
    assert everything > some
    for memory_bytes, mode in (
        (everything * 1.101, False),
        (everything * 1.099, "selective"),
        (some * 1.099, True),
    ):
        found = chosen("auto", memory_bytes)
        assert found.mode == mode
        assert f"auto takes {str(mode).lower()}, with which 2 ranks together need about " in found.reason


def test_a_rehearsal_says_the_mode(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, build_tiny_model(tmp_path / "base"))
    assert "auto takes false" in memory_note(load_settings(str(recipe), ("model.gradient_checkpointing=auto",)), 2)
    assert "auto" not in memory_note(load_settings(str(recipe)), 2)
