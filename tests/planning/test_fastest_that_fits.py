"""`model.gradient_checkpointing: auto`, by hand: the fastest mode whose planned memory fits, with a tenth to spare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import write_recipe
from tiny import build_tiny_model

from uft_ds.planning import here
from uft_ds.planning.hardware import GB, Figures, cluster_of
from uft_ds.planning.here import Chosen, Place, chosen_recompute, memory_note
from uft_ds.planning.plan import Plan, make_plan
from uft_ds.planning.planner import Planner
from uft_ds.planning.shapes import model_config, shipped_config
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.to_settings import load_settings

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


def test_other_files_are_planned_with_their_own_choice(planner: Planner) -> None:
    """As the recipe would be planned with each: a file is not said to lack memory for a mode that it would not take."""

    def planned(file: str) -> Plan:
        changes = ("model.gradient_checkpointing=auto", "train.tokens_per_micro_batch=2048", f"deepspeed={file}")
        settings = load_settings("uft_mistral7b", changes)
        figures = Figures(gpu_memory=24, host_memory=2000, network_gbits=400)
        return make_plan(settings, cluster_of(nodes=1, gpus=2, gpu="h100", figures=figures), planner=planner)

    own = {name: planned(name).outcome for name in ("zero3", "zero3_offload")}
    assert len({outcome.setting.workload.gradient_checkpointing for outcome in own.values()}) > 1
    for row in planned("zero3_offload").files:
        name = row.outcome.setting.deepspeed
        if name in own:
            assert row.outcome.gpu.total_bytes == own[name].gpu.total_bytes
            assert not any("gradient_checkpointing" in change for change in row.changes)


def test_the_attention_is_that_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of other GPUs assumes flash-attention; ranks without it must not."""
    base = build_tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2"}
    (base / "config.json").write_text(json.dumps(config))
    settings = load_settings(str(write_recipe(tmp_path, base)), ("model.dtype=bfloat16", "reference.mode=separate"))
    seen = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda self, setting: seen.append(setting.workload) or plan(self, setting))
    chosen_recompute(settings, Place(1, 1, True, 80 * GB))
    assert {workload.attention for workload in seen} == {"sdpa"}
    assert workload_of(settings, model_config(str(base))[0], tokens_per_response=None).attention == "flash_attention_2"


def test_a_container_with_less_memory_than_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "memory_limit_bytes", lambda: 3 * GB)
    assert here.this_machine(2).memory_bytes == 3 * GB
    monkeypatch.setattr(here, "memory_limit_bytes", lambda: 1 << 60)
    assert 3 * GB < here.this_machine(2).memory_bytes < 1 << 60


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
        assert found.fits
    short = chosen("auto", 1000)
    assert (short.mode, short.fits) == (True, False)
    assert "it does not fit: `uft plan` says what to change" in short.reason


def test_a_rehearsal_says_the_mode(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, build_tiny_model(tmp_path / "base"))
    assert "auto takes false" in memory_note(load_settings(str(recipe), ("model.gradient_checkpointing=auto",)), 2)
    assert "auto" not in memory_note(load_settings(str(recipe)), 2)
