"""`lora.experts`: adapters of a mixture's routed experts beside those of its attention; the router stays frozen."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, assert_same_step, engine_of, single_process
from mixtures import TARGETS, outputs_and_gradients
from plan_measured import counting
from ranks import run_on_ranks
from runs import losses, recipe_in, uft
from toy import objective, toy_step
from transformers import AutoConfig, AutoModelForCausalLM

from uft_ds.planning.structure import Lora, structure_of

LORA = {"rank": 4, "alpha": 8.0, "targets": TARGETS, "experts": True}
OPTIONS: dict[str, Any] = {"targets": TARGETS, "experts": True}


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_lockstep_with_adapters_of_experts_equals_two_separate_forwards(
    mixture: Path, gradient_checkpointing: bool
) -> None:
    """Invariant 6: bit for bit, and the experts' adapters have gradients of their own."""
    options = {"gradient_checkpointing": gradient_checkpointing, "experts": True}
    ours, own_grads = outputs_and_gradients(mixture, "lockstep", **options)
    theirs, grads = outputs_and_gradients(mixture, "separate", **options)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("policy", "reference"))
    of_experts = [name for name in grads if ".experts." in name]
    assert len(of_experts) == 8  # two weights with A and B in each of two layers
    assert all(grads[name].abs().max() > 0 for name in of_experts)
    assert all(torch.equal(own_grads[name], grad) for name, grad in grads.items())


def step_on_ranks(folder: Path, options: dict[str, Any]) -> Any:
    engine = engine_of(folder, **options)
    batches = engine.micro_batches(toy_step(), 64)
    with counting() as sent:
        grads, loss = accumulate(engine, batches, objective("mse"))
    return grads, loss, engine.step(1e-3).grad_norm, sent.gathered


@pytest.mark.long
def test_gradients_of_adapters_of_experts_are_those_of_one_process(qwen3_moe: Path) -> None:
    """On two ZeRO-3 ranks, whose tokens are routed differently."""
    expected = single_process(qwen3_moe, "mse", reference_mode="separate", **OPTIONS)
    for found in run_on_ranks(step_on_ranks, 2, qwen3_moe, OPTIONS):
        assert_same_step(found, expected)


def test_the_plan_counts_adapters_of_experts(mixture: Path) -> None:
    """Rank 4 for each of four experts: A has 4 x 4 rows, B as many columns."""
    config = AutoConfig.from_pretrained(mixture)
    with_experts, without = (
        structure_of(config, Lora(4, 8.0, TARGETS, "float32", experts=experts)) for experts in (True, False)
    )
    hidden, inner = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    gate_up, down = 16 * (hidden + 2 * inner), 16 * (inner + hidden)
    assert with_experts.num_lora - without.num_lora == config.num_hidden_layers * (gate_up + down)


@pytest.mark.long
def test_a_run_with_adapters_of_experts_is_resumed_and_merged(qwen3_moe: Path, tmp_path: Path) -> None:
    """From the recipe to a model that Hugging Face loads, by way of a second run that starts from the first one."""
    recipe = recipe_in(tmp_path, qwen3_moe, lora=LORA)
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    for arguments in (("model",), ("adapter", "--to", "adapter")):
        result = uft("convert", str(tmp_path / "run"), str(tmp_path / arguments[0]), *arguments[1:])
        assert result.returncode == 0, result.stdout + result.stderr
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    ours = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    theirs = dict(AutoModelForCausalLM.from_pretrained(qwen3_moe).named_parameters())
    changed = {
        ".".join(name.removesuffix(".weight").split(".")[-2:])
        for name, value in theirs.items()
        if not torch.equal(ours[name], value)
    }
    expected = {f"self_attn.{name}" for name in TARGETS} | {"experts.gate_up_proj", "experts.down_proj"}
    assert changed == expected
    second = recipe_in(tmp_path, qwen3_moe, lora=LORA, name="second", reference={"adapter": str(tmp_path / "adapter")})
    result = uft("train", str(second), f"output={tmp_path / 'second'}", "train.steps=1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_router_beside_adapted_experts_is_refused(qwen3_moe: Path, tmp_path: Path) -> None:
    """By the recipe's key, before anything is launched."""
    for lora, words in (
        (LORA | {"targets": "all-linear"}, r"adapts .*gate"),
        (LORA | {"targets": ["q_proj", "gate"]}, r"'gate' is a \w+Router, expected linear layers"),
    ):
        result = uft("train", str(recipe_in(tmp_path, qwen3_moe, lora=lora)))
        assert result.returncode == 2
        assert re.search(rf"lora\.targets: .*{words}", result.stderr), result.stderr


def test_experts_of_a_dense_model_are_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """There are none, which the message says by the recipe's key."""
    result = uft("train", str(recipe_in(tmp_path, tiny_qwen2, lora=LORA)))
    assert result.returncode == 2
    assert "lora.experts: true given, but Qwen2ForCausalLM has no routed experts" in result.stderr
