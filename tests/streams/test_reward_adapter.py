"""A reward model's adapter beside the policy's: its rewards are Hugging Face's, and the policy does not notice it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import conversations, rewards_by_peft, saved_reward_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import streams_of, toy_model, toy_policy, toy_sequences

from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import UserError
from uft_ds.rollouts.stream_scorer import sequence_of
from uft_ds.streams.reward_adapter import add_reward_adapter
from uft_ds.streams.stream import SCORING

BATCH = micro_batch(toy_sequences(4))
LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def adapter(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_reward_adapter(tiny_qwen2, tmp_path_factory.mktemp("reward") / "adapter")


@pytest.mark.parametrize("mode", ["lockstep", "separate"])
def test_rewards_are_those_of_hugging_face(tiny_qwen2: Path, adapter: Path, mode: Any) -> None:
    """Packed, beside an adapter of the policy with another rank, scale and other layers, against PEFT's own loading
    into transformers' classifier, one conversation at a time: to 1e-5."""
    model = toy_model(tiny_qwen2, reward_adapter=adapter, reference_mode=mode)
    given = conversations()
    batch = micro_batch([sequence_of(*tokens, "") for tokens in given])
    with torch.no_grad():
        values_R = model(batch, [SCORING])["reward"].values_R
    expected_R = rewards_by_peft(tiny_qwen2, adapter, given)
    assert expected_R.std() > 0.1, "the rewards should differ"
    torch.testing.assert_close(values_R, expected_R, rtol=0, atol=1e-5)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logps_N = model(BATCH, streams_of(model))["policy"].token_logps_N
    (logps_N * torch.linspace(-1, 1, len(logps_N))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("of_policy", "of_reward"),
    [("all-linear", ("q_proj",)), (["v_proj"], "all-linear"), (["v_proj"], ("q_proj", "down_proj"))],
    ids=["fewer layers", "more layers", "other layers"],
)
def test_the_policy_does_not_notice_it(tiny_qwen2: Path, tmp_path: Path, of_policy: Any, of_reward: Any) -> None:
    """Its log-probs, gradients and what is trained are those of a model without it, bit for bit, and so is the next
    number of torch's generator; whichever layers have an adapter of both, of one or of none."""
    adapter = saved_reward_adapter(tiny_qwen2, tmp_path / "adapter", targets=of_reward)
    alone, drawn = toy_model(tiny_qwen2, targets=of_policy), torch.rand(1)
    model = toy_model(tiny_qwen2, targets=of_policy, reward_adapter=adapter)
    assert torch.equal(torch.rand(1), drawn)
    ours, theirs = (outputs_of(model), outputs_of(alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found, expected = gradients(model), gradients(alone)
    assert set(found) == set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def outputs_of(model: Any) -> dict[str, Tensor]:
    return {name: output.token_logps_N.detach() for name, output in model(BATCH, streams_of(model)).items()}


def test_it_is_frozen_and_its_head_is_no_parameter(tiny_qwen2: Path, adapter: Path) -> None:
    """So no optimiser, checkpoint or shard can hold the head; the adapter has the type that is asked for."""
    model = toy_model(tiny_qwen2, reward_adapter=adapter, lora_dtype=torch.bfloat16)
    own = {name: p for name, p in model.named_parameters() if ".reward." in name}
    assert own
    assert {(p.requires_grad, p.dtype) for p in own.values()} == {(False, torch.bfloat16)}
    assert not [name for name in model.state_dict() if "scores" in name]


def changed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrite an adapter's files."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def without_head(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["base_model.model.score.weight"]


def two_labels(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.score.weight"] = torch.ones(2, 64)


def not_finite(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[LORA_B][0, 0] = torch.nan


def never_trained(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()


def half(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[LORA_B]


def another_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[LORA_B] = torch.ones(96, 3)


def another_rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["r"] = 5


def another_layer(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for side in "AB":
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()


def dora(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["use_dora"] = True


def of_a_policy(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["modules_to_save"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "the head of a reward model; expected a run of objective.reward: head"),
        (two_labels, r"\[2, 64\], expected a finite head"),
        (not_finite, f"{LORA_B} holds NaN"),
        (never_trained, "every lora_B is zero: this reward model was never trained"),
        (half, f"holds no {LORA_B}"),
        (another_shape, r"has shape \[96, 3\], expected \[64, 3\]: it was trained on another model"),
        (another_rank, r"has shape \[3, 64\], expected \[5, 64\]"),
        (another_layer, r"model\.layers\.9\.self_attn\.q_proj: model\.base has no such layer"),
        (dora, "use_dora: True found, expected False: only a plain LoRA"),
        (of_a_policy, r"modules_to_save: None found, expected \['score'\]"),
    ],
)
def test_what_is_no_reward_model_of_this_base_is_refused(
    tiny_qwen2: Path, tmp_path: Path, change: Any, message: str
) -> None:
    """By the recipe's key, the folder and the tensor or the field, before anything is computed."""
    adapter = saved_reward_adapter(tiny_qwen2, tmp_path / "adapter")
    changed(adapter, change)
    with pytest.raises(UserError, match=message) as caught:
        add_reward_adapter(toy_policy(tiny_qwen2), adapter, "data.sources.0.score_by", dtype=torch.float32)
    assert str(caught.value).startswith("data.sources.0.score_by: ")
