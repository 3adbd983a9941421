"""A policy that starts from an adapter computes what PEFT makes of that adapter, or does not start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import build_tiny_model
from toy import saved_adapter, toy_sequences

from uft_ds.errors import CheckFailed
from uft_ds.export.agreement import base_and_log_ratios
from uft_ds.training.start_check import check_starts_as_adapter

SEQUENCES = toy_sequences(5, seed=3)


def changed_tensors(folder: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(folder, out)
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def checked(base: Path, expected: list[float], dtype: torch.dtype, model: dict[str, Any]) -> Any:
    engine = engine_of(base, dtype=dtype, lora_dtype=dtype, **({"b_std": 0.0} | model))
    try:
        found = check_starts_as_adapter(engine, SEQUENCES, expected, tokens_per_micro_batch=64, dtype=dtype)
    except CheckFailed as error:
        return str(error)
    return found


def all_checked(base: Path, expected: list[float], models: dict[str, tuple[Path, torch.dtype, dict[str, Any]]]) -> Any:
    return {name: checked(of, expected, dtype, model) for name, (of, dtype, model) in models.items()}


@pytest.mark.parametrize("kinds", long_but(["some"], ["some", "all"]))
def test_a_start_that_is_not_the_adapter_is_refused(tiny_qwen2: Path, tmp_path: Path, kinds: str) -> None:
    """Rightly loaded, in both types: agreement. Not loaded, at half its alpha, layers exchanged, A and B of another
    adapter, or another base: refused by every rank with both numbers."""
    adapter = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    _, log_ratios_R = base_and_log_ratios(tiny_qwen2, adapter, SEQUENCES)
    expected = log_ratios_R.tolist()

    def halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2 if "lora_B" in name else tensor

    stored = load_file(adapter / "adapter_model.safetensors")

    def exchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        swap = {"layers.0": "layers.1", "layers.1": "layers.0"}
        old = next((layer for layer in swap if layer in name), None)
        return tensor if old is None else stored[name.replace(old, swap[old])].clone()

    float32, other_base = torch.float32, build_tiny_model(tmp_path / "other", seed=7)
    models: dict[str, tuple[Path, torch.dtype, dict[str, Any]]] = {
        "right": (tiny_qwen2, float32, {"start_adapter": adapter}),
        "right in bfloat16": (tiny_qwen2, torch.bfloat16, {"start_adapter": adapter}),
        "not loaded": (tiny_qwen2, float32, {}),
        "half of alpha": (tiny_qwen2, float32, {
            "start_adapter": changed_tensors(adapter, tmp_path / "halved", halved)}),
        "layers exchanged": (tiny_qwen2, float32, {
            "start_adapter": changed_tensors(adapter, tmp_path / "exchanged", exchanged)}),
        "another base": (other_base, float32, {"start_adapter": adapter}),
        "as reference": (tiny_qwen2, float32, {"reference_adapter": adapter}),
    }  # fmt: skip
    if kinds == "some":
        models = {name: models[name] for name in ("right", "right in bfloat16", "not loaded", "another base")}
    found = run_on_ranks(all_checked, 2, tiny_qwen2, expected, models)
    for of_rank in found:
        right = of_rank.pop("right")
        assert right.error < 1e-4 < 0.1 < right.size
        assert not right.is_below_rounding
        assert of_rank.pop("right in bfloat16").agrees
        for name, message in of_rank.items():
            assert isinstance(message, str), name
            assert message.startswith("start.adapter: before the first step its log-ratios to the base are"), name
        of_rank["right"] = right


def test_an_adapter_without_effect_is_told(tiny_qwen2: Path, tmp_path: Path) -> None:
    """In bfloat16 an adapter of 1e-6 nats cannot be told from none."""
    adapter = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    tiny = changed_tensors(adapter, tmp_path / "tiny", lambda name, tensor: tensor * 1e-4)
    _, log_ratios_R = base_and_log_ratios(tiny_qwen2, tiny, SEQUENCES)
    models = {"tiny": (tiny_qwen2, torch.bfloat16, {"start_adapter": tiny})}
    (found,) = run_on_ranks(all_checked, 1, tiny_qwen2, log_ratios_R.tolist(), models)
    assert found["tiny"].agrees
    assert found["tiny"].is_below_rounding


def test_the_expected_log_ratios_read_the_config_of_the_adapter(tiny_qwen2: Path, tmp_path: Path) -> None:
    """They are another reader's: twice the alpha is about twice the change."""
    adapter = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    small = changed_tensors(adapter, tmp_path / "small", lambda name, t: t * 0.1 if "lora_B" in name else t)
    _, once_R = base_and_log_ratios(tiny_qwen2, small, SEQUENCES)
    config = json.loads((small / "adapter_config.json").read_text())
    (small / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    _, twice_R = base_and_log_ratios(tiny_qwen2, small, SEQUENCES)
    assert float(twice_R.norm() / once_R.norm()) == pytest.approx(2.0, rel=0.2)
