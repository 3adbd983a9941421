"""A model with adapters, without memory: counted, and cut into the modules that ZeRO-3 visits."""

from pathlib import Path

import pytest
import torch
from tiny import build_tiny_model
from transformers import AutoConfig, Gemma3Config

from uft_ds.errors import UserError
from uft_ds.planning import parts
from uft_ds.planning.activations import activations_of
from uft_ds.planning.shapes import shipped_config
from uft_ds.planning.structure import Lora, structure_of
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.load import check_base, empty_base, load_base

LORA = Lora(4, 8.0, "all-linear", "float32")


def whole_policy(config: object, lora: Lora = LORA) -> dict[str, torch.nn.Parameter]:
    """All layers with adapters, by PEFT, on the meta device."""
    policy = add_adapters(
        empty_base(config), rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dtype=torch.float32, seed=0
    )
    return dict(policy.named_parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_policy_parameter_by_parameter(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Adapters on two layers, and the others taken to be alike, give the same sizes as PEFT on all."""
    folder = build_tiny_model(tmp_path, architecture, tied=tied)  # type: ignore[arg-type]
    structure = structure_of(check_base(str(folder), None), LORA)
    policy = whole_policy(check_base(str(folder), None))
    expected = sorted((p.numel(), p.requires_grad) for p in policy.values())
    assert sorted(zip(structure.sizes, structure.is_trainable, strict=True)) == expected
    assert (structure.head == structure.embedding) is tied
    for number, layer in enumerate(structure.layers):
        own = [p.numel() for name, p in policy.items() if f".layers.{number}." in name]
        assert sorted(structure.sizes[p] for p in layer) == sorted(own)


def test_a_target_may_name_one_layer(tmp_path: Path) -> None:
    """Layers that then differ are not taken for alike."""
    lora = Lora(4, 8.0, ["layers.1.self_attn.q_proj"], "float32")
    structure = structure_of(check_base(str(build_tiny_model(tmp_path)), None), lora)
    assert [sum(structure.is_trainable[p] for p in layer) for layer in structure.layers] == [0, 2]


def test_a_reference_adapter_is_frozen_and_of_the_adapters_type(tmp_path: Path) -> None:
    """It doubles the adapters, none of it is trained, and it counts in the adapters' type."""
    config = check_base(str(build_tiny_model(tmp_path)), None)
    plain = structure_of(config, LORA)
    doubled = structure_of(config, Lora(4, 8.0, "all-linear", "float32", has_reference=True))
    assert doubled.num_lora == plain.num_lora
    assert sum(doubled.sizes) == sum(plain.sizes) + plain.num_lora
    assert doubled.num_base == plain.num_base
    adapters = {b for b, adapts in zip(doubled.item_bytes("bfloat16"), doubled.is_adapter, strict=True) if adapts}
    assert adapters == {4}


SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["phi", "gpt_neox", "llama", "gptj"])
def test_a_final_norm_is_found_under_any_name(model_type: str) -> None:
    """With the layers, the embedding and the head it is the whole model, and all of it vectors of the hidden size."""
    structure = structure_of(AutoConfig.for_model(model_type, **SMALL), LORA)
    assert {structure.sizes[p] for p in structure.norm} == {64}
    visited = {
        *structure.norm,
        *structure.head,
        *structure.embedding,
        *(p for layer in structure.layers for p in layer),
    }
    assert visited == set(range(len(structure.sizes)))


def test_a_multimodal_config_is_planned_by_its_text_model() -> None:
    """Gemma 3's class around a text model has its sizes one level down; its tower is held and never visited."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    structure = structure_of(config, LORA)
    assert (structure.num_layers, structure.config.hidden_size, structure.config.vocab_size) == (3, 64, 100)
    alone = structure_of(config.get_text_config(), LORA)
    assert [len(layer) for layer in structure.layers] == [len(layer) for layer in alone.layers]
    assert structure.num_base > alone.num_base
    saved, of_alone = (
        activations_of(
            which,
            lengths=(32, 32),
            dtype="float32",
            gradient_checkpointing=False,
            lockstep=False,
            attention="eager",
            under_zero3=False,
        ).saved_bytes
        for which in (structure, alone)
    )
    assert saved == pytest.approx(of_alone, rel=0.05), "masks may differ"


def test_a_config_that_gives_no_model_is_answered() -> None:
    """With its name, the key where there is one, and what was found."""
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    with pytest.raises(UserError, match=r"lora\.targets: GPT2LMHeadModel has no linear layer that can be adapted"):
        structure_of(AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4, **no_dropout), LORA)
    for key in ("hidden_size", "vocab_size"):
        with pytest.raises(UserError, match=rf"model\.base: config\.json of .*llama.*{key}: 0 found"):
            structure_of(AutoConfig.for_model("llama", **(SMALL | {key: 0})), LORA)
    with pytest.raises(UserError, match=r"'nonsense' \(config\.json of .*llama"):
        structure_of(AutoConfig.for_model("llama", **SMALL, hidden_act="nonsense"), LORA)


@pytest.mark.long
def test_adapters_of_a_large_model_are_pefts() -> None:
    """The 32B model with all 64 layers given adapters by PEFT."""
    config = shipped_config("Qwen2.5-32B")
    lora = Lora(16, 16.0, "all-linear", "float32")
    trained = sum(p.numel() for p in whole_policy(config, lora).values() if p.requires_grad)
    assert structure_of(config, lora).num_lora == trained == 134_217_728


def test_a_base_in_nf4_is_counted_byte_by_byte(tmp_path: Path) -> None:
    """What a loaded one holds at ZeRO stage 2: codes, constants and all that stays in 16 bits; within 1%. As many
    parameters as before."""
    folder = build_tiny_model(tmp_path, tied=False)
    config = check_base(str(folder), None)
    structure, plain = structure_of(config, LORA, "nf4"), structure_of(config, LORA)
    options = {"revision": None, "attention": "auto", "gradient_checkpointing": False, "quantization": "nf4"}
    model = load_base(str(folder), dtype=torch.bfloat16, **options)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    constants = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *constants))
    assert parts.weights_bytes(structure, structure.item_bytes("bfloat16"), 1) == pytest.approx(held, rel=0.01)
    assert structure.num_base == plain.num_base
    assert structure.sizes == plain.sizes
    largest = max(layer.weight.quant_state.shape.numel() for layer in model.modules() if hasattr(layer, "in_features")
                  and hasattr(layer.weight, "quant_state"))  # fmt: skip
    assert structure.decoded_bytes("bfloat16") == pytest.approx(2 * largest, rel=0.04)
