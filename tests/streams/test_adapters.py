"""LoRA adapters: where they sit, what they start from, and looking past them at the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import TARGETS
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from torch import Tensor
from toy import both, logps_by_name, saved_adapter, token_logps, toy_model, toy_policy, toy_sequences
from transformers import AutoModelForCausalLM

from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import UserError
from uft_ds.streams.adapters import (
    adapter_config_of,
    add_adapters,
    as_stream,
    start_from_adapter,
    start_policy_from_adapter,
)
from uft_ds.streams.load import load_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.packed_attention import attention_of_transformers
from uft_ds.streams.stream import BARE_BASE, POLICY_ADAPTER, REFERENCE_ADAPTER, Stream


def test_as_stream_computes_the_base_and_comes_back_after_an_exception(tiny_qwen2: Path) -> None:
    """Within the block: bit for bit the bare base; afterwards: the policy again, whatever happened inside."""
    policy: Any = toy_model(tiny_qwen2).policy
    bare = load_base(
        str(tiny_qwen2), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False
    )
    token_ids_1T = torch.arange(3, 30)[None]

    def logits() -> Tensor:
        with torch.no_grad(), attention_of_transformers(policy.get_base_model()):
            return policy(input_ids=token_ids_1T, use_cache=False).logits

    before = logits()
    requires_grad = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    within: list[Tensor] = []

    def interrupted() -> None:
        with as_stream(policy, BARE_BASE):
            within.append(logits())
            assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(within[0], bare(input_ids=token_ids_1T, use_cache=False).logits)
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == requires_grad
    assert torch.equal(logits(), before)
    assert not torch.equal(before, within[0])


def test_as_stream_nests(tiny_qwen2: Path) -> None:
    """Leaving an inner block leaves the outer one as it was: what was there comes back, not `on`."""
    policy: Any = toy_model(tiny_qwen2).policy
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    with as_stream(policy, BARE_BASE):
        with as_stream(policy, BARE_BASE):
            assert layer.disable_adapters
        assert layer.disable_adapters
        with as_stream(policy, Stream("third", "third")):
            assert not layer.disable_adapters
            assert layer.active_adapters == ["third"]
        assert layer.disable_adapters
        assert layer.active_adapters == ["default"]
    assert not layer.disable_adapters


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head"], "the head cannot have an adapter"),
        (["q_proj", "lm_head"], "the head cannot have an adapter"),
        (["embed_tokens"], "'embed_tokens' is a Embedding, expected linear layers"),
        (["nope"], "no layer is called 'nope'; expected one of down_proj, gate_proj, k_proj, o_proj, q_proj"),
        (["q_proj", "vproj"], "no layer is called 'vproj'"),
        (["proj"], "no layer is called 'proj'"),
        (["mlp"], "'mlp' is a Qwen2MLP, expected linear layers"),
        ([], "target_modules"),
    ],
    ids=str,
)
def test_unusable_targets_are_refused(tmp_path: Path, tied: bool, targets: list[str], message: str) -> None:
    """The head, embeddings, names that match nothing (one among good ones too) and modules that are not linear."""
    folder = build_tiny_model(tmp_path, tied=tied)
    with pytest.raises(UserError) as caught:
        toy_policy(folder, targets=targets)
    assert str(caught.value).startswith("lora.targets: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_above_every_layer_is_refused(tiny_qwen2: Path) -> None:
    """Before its memory is asked for: of the layers between 64, 32 and 96, the largest can use 64."""
    options: Any = {"alpha": 8.0, "targets": "all-linear", "dtype": torch.float32, "seed": 0}
    add_adapters(AutoModelForCausalLM.from_pretrained(tiny_qwen2), rank=64, **options)
    for rank in (65, 10**9):
        with pytest.raises(UserError, match=rf"^lora\.rank: {rank} given, but no layer .* can use more than 64$"):
            add_adapters(AutoModelForCausalLM.from_pretrained(tiny_qwen2), rank=rank, **options)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all-linear", 7 * 2), (["q_proj", "v_proj"], 2 * 2), (["layers.1.mlp.up_proj"], 1)],
    ids=str,
)
def test_adapters_sit_where_they_were_asked_for(tiny_qwen2: Path, targets: Any, layers: int) -> None:
    """2 layers with 7 linear modules each: an A and a B for every match, B zero, all trainable and nothing else."""
    policy = toy_policy(tiny_qwen2, targets=targets)
    trainable = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * layers
    assert all("lora_A" in name or "lora_B" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    for name, parameter in trainable.items():
        assert bool(parameter.any()) == ("lora_A" in name), name


def test_adapters_depend_on_the_seed_alone(tiny_qwen2: Path) -> None:
    """Equal on every rank: the same seed draws the same A whatever was drawn before, another seed another A."""

    def drawn(seed: int) -> dict[str, Tensor]:
        return get_peft_model_state_dict(toy_policy(tiny_qwen2, seed=seed))

    one = drawn(7)
    torch.rand(13)
    again, other = drawn(7), drawn(8)
    assert set(one) == set(again)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_the_type_that_was_asked_for(tiny_qwen2: Path, dtype: torch.dtype) -> None:
    """Whatever the base's: PEFT alone would give the one or the other by the load path."""
    trainable = [parameter for parameter in toy_policy(tiny_qwen2, dtype=dtype).parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {dtype}


# ---- a reference other than the bare base


@pytest.mark.parametrize("mode", ["lockstep", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_ratio_is_exactly_zero_from_a_reference_adapter(
    tiny_qwen2: Path, tmp_path: Path, mode: Any, dtype: torch.dtype
) -> None:
    """Invariant 1: the policy starts as the reference, bit for bit; neither is the bare base."""
    folder = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    policy = toy_policy(tiny_qwen2, dtype=dtype, seed=9)
    start_from_adapter(policy, folder)
    batch = micro_batch(toy_sequences(3))
    logps_R, reference_logps_R = both(UFTModel(policy, reference_mode=mode), batch)
    assert (logps_R - reference_logps_R).tolist() == [0.0] * len(batch.responses)
    base_R = logps_by_name(toy_model(tiny_qwen2, b_std=0.0), batch, "policy")["policy"]
    assert (logps_R - base_R).abs().max() > 0.1


def test_the_reference_adapter_stays_while_the_policy_moves(tiny_qwen2: Path, tmp_path: Path) -> None:
    """After a step the reference is PEFT's own base + saved adapter, and only the policy's adapter was trainable."""
    folder = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    policy = toy_policy(tiny_qwen2)
    names = set(get_peft_model_state_dict(policy))
    start_from_adapter(policy, folder)
    model = UFTModel(policy)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)
    batch = micro_batch(toy_sequences(3))
    both(model, batch)[0].sum().backward()
    torch.optim.SGD(trainable.values(), lr=1e-2).step()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trainable)
    logps_N, reference_logps_N = token_logps(model, batch)
    assert not torch.allclose(logps_N, reference_logps_N, atol=1e-2)
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen2), folder).eval()
    with torch.no_grad():
        logits_TV = plain(
            input_ids=batch.token_ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False
        ).logits[0]
    expected_N = logits_TV.log_softmax(-1)[batch.predictors_N].gather(1, batch.targets_N[:, None])[:, 0]
    torch.testing.assert_close(reference_logps_N, expected_N, rtol=0, atol=1e-5)
    assert set(get_peft_model_state_dict(policy)) == names, "what a checkpoint holds is the policy's adapter alone"


def test_an_adapter_of_an_older_peft_is_accepted(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Fields that it did not write have the value that they had: the default."""
    folder = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    old = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "task_type", "base_model_name_or_path")
    path.write_text(json.dumps({key: config[key] for key in old}))
    policy = toy_policy(tiny_qwen2)
    start_from_adapter(policy, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    for adapter in (POLICY_ADAPTER, REFERENCE_ADAPTER):
        loaded = get_peft_model_state_dict(policy, adapter_name=adapter)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())


def test_an_adapter_of_another_form_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Rank, alpha, layers, shape, kind, NaN, a missing or torn file: each named, with what was found and expected."""

    def refusal(folder: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            start_from_adapter(toy_policy(tiny_qwen2, **options), folder)
        return str(caught.value)

    def edited(name: str, **changes: Any) -> Path:
        folder = saved_adapter(tiny_qwen2, tmp_path / name)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    assert "r is 8, expected 4 (lora.rank)" in refusal(edited("rank", r=8))
    assert "lora_alpha is 1.5, expected 8.0 (lora.alpha)" in refusal(edited("alpha", lora_alpha=1.5))
    assert "use_dora is True, expected None" in refusal(edited("dora", use_dora=True))
    assert "use_rslora is True" in refusal(edited("rslora", use_rslora=True))
    assert "modules_to_save is ['lm_head']" in refusal(edited("saved", modules_to_save=["lm_head"]))
    assert "init_lora_weights: 'pissa' changes the base's weights" in refusal(
        edited("pissa", init_lora_weights="pissa")
    )
    assert "use_newer: 1: not known to the installed PEFT" in refusal(edited("newer", use_newer=1))
    assert "peft_type: 'IA3' found, expected 'LORA'" in refusal(edited("ia3", peft_type="IA3"))
    few = saved_adapter(tiny_qwen2, tmp_path / "few", targets=["q_proj"])
    assert "it is not in the file; lora.targets must name the same layers" in refusal(few)
    whole = saved_adapter(tiny_qwen2, tmp_path / "whole")
    assert "the policy has no adapter there" in refusal(whole, targets=["q_proj"])
    wide = saved_adapter(tiny_qwen2, tmp_path / "wide")
    tensors = load_file(wide / "adapter_model.safetensors")
    save_file({name: torch.cat([t, t], dim=1) for name, t in tensors.items()}, wide / "adapter_model.safetensors")
    assert "it was trained on another model" in refusal(wide)
    diverged = saved_adapter(tiny_qwen2, tmp_path / "diverged")
    tensors = load_file(diverged / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, diverged / "adapter_model.safetensors")
    assert "lora_A.weight holds NaN or infinity" in refusal(diverged)
    assert "no such file" in refusal(tmp_path / "nowhere")
    torn = saved_adapter(tiny_qwen2, tmp_path / "torn")
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "adapter_model.safetensors: cannot be read" in refusal(torn)
    (whole / "adapter_config.json").write_text("null")
    assert "adapter_config.json: cannot be read as an adapter's config (ValueError: null found, expected an object" in (
        refusal(whole)
    )
    (whole / "adapter_config.json").unlink()
    assert "adapter_config.json: cannot be read" in refusal(whole)


def test_an_adapter_with_other_experts_is_refused_by_the_recipes_key(qwen3_moe: Path, tmp_path: Path) -> None:
    """Experts in one of the two, or other weights of them: the message names `lora.experts`, which no config of PEFT's
    has."""
    options: Any = {"targets": TARGETS}
    without = saved_adapter(qwen3_moe, tmp_path / "without", **options)
    whole = saved_adapter(qwen3_moe, tmp_path / "whole", **options, experts=True)
    half = saved_adapter(qwen3_moe, tmp_path / "half", **options, experts=True)
    path = half / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["experts.down_proj"]}))
    both = "experts.down_proj, experts.gate_up_proj"
    for start, key in ((start_from_adapter, "reference.adapter"), (start_policy_from_adapter, "start.adapter")):
        for folder, experts, found, remedy in (
            (whole, False, f"experts ({both}), but lora.experts is false", "set lora.experts: true"),
            (without, True, "no experts, but lora.experts is true", "leave lora.experts out"),
            (half, True, "experts (experts.down_proj)", f"with lora.experts: true, {both} are adapted; take an"),
        ):
            with pytest.raises(UserError) as refused:
                start(toy_policy(qwen3_moe, **options, experts=experts), folder)
            message = str(refused.value)
            assert message.startswith(f"{key}: {folder}: it adapts {found}: the policy starts from this adapter")
            assert remedy in message


def test_equal_adapters_have_equal_configs(tiny_qwen2: Path) -> None:
    """PEFT writes the names of the layers in the order of a set; here they are sorted."""
    policy: Any = toy_policy(tiny_qwen2)
    names = json.loads(adapter_config_of(policy))["target_modules"]
    assert names == sorted(names)
    assert len(names) > 1
