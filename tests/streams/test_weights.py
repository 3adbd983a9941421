"""Weight files are held against the model of config.json by their headers: good ones pass, damaged ones are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from suites import long_but
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from uft_ds.errors import UserError
from uft_ds.streams.load import load_weights, meta_model
from uft_ds.streams.weights import check_weights, first_non_finite, own_values

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | GROUPED),
    "qwen2": ("Qwen2", SIZES | GROUPED),
    "qwen3": ("Qwen3", SIZES | GROUPED | {"head_dim": 8}),
    "mistral": ("Mistral", SIZES | GROUPED),
    "gpt_neox": ("GPTNeoX", SIZES),
    "phi3": ("Phi3", SIZES | GROUPED),
    "gemma2": ("Gemma2", SIZES | GROUPED | {"head_dim": 8}),
    "granite": ("Granite", SIZES | GROUPED),
    "opt": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", GPT),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGen", GPT | {"rotary_dim": 4}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "qwen3_moe": ("Qwen3Moe", SIZES | GROUPED | EXPERTS),
    "mixtral": ("Mixtral", SIZES | GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
CLASS_OF_HEAD = {"GPT2": "GPT2LMHeadModel"}
UP_PROJECTION = "model.layers.1.mlp.up_proj.weight"


def build(folder: Path, kind: str, *, tied: bool = False, **options: Any) -> Path:
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=tied)
    model = getattr(transformers, CLASS_OF_HEAD.get(name, f"{name}ForCausalLM"))(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def check(folder: Path) -> None:
    check_weights(folder, meta_model(AutoConfig.from_pretrained(folder)))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(folder)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("weights") / "llama", "llama")


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("shards", ["whole", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_transformers_saves_is_whole(tmp_path: Path, kind: str, tied: bool, shards: str) -> None:
    """No good base is refused: any architecture, tied or not, in one file or several."""
    folder = build(tmp_path, kind, tied=tied, max_shard_size="15KB" if shards == "sharded" else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == (shards == "sharded")
    check(folder)


@pytest.mark.parametrize("kind", long_but(("llama", "gpt2"), MODELS))
def test_each_tensor_is_needed(tmp_path: Path, kind: str) -> None:
    """Without any one of its tensors a base is refused by the name of that tensor on the disk."""
    folder = build(tmp_path, kind)
    whole = load_file(folder / "model.safetensors")
    for name in (name for name in whole if ".0." not in name):  # the two layers are alike
        change(folder, lambda tensors, name=name: (tensors.update(whole), tensors.pop(name)))
        message = refused(folder)
        assert name in message
        assert "model.safetensors" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused_whatever_config_json_says(damaged: Path, dtype: torch.dtype) -> None:
    """Without quantization_config transformers takes the stored integers for the weights."""
    change(damaged, lambda tensors: tensors.update({UP_PROJECTION: tensors[UP_PROJECTION].to(dtype)}))
    message = refused(damaged)
    assert f"{UP_PROJECTION} is stored as {str(dtype).replace('torch.', '')[0].upper()}" in message
    assert "take the 16-bit model" in message


def test_weights_of_64_bits_are_numbers(damaged: Path) -> None:
    """They are loaded in the type of the run."""
    change(damaged, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    check(damaged)


def test_an_adapter_beside_the_weights_is_refused(damaged: Path) -> None:
    """transformers adds an adapter of the model's folder to the model: the base would be another than its files say."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(damaged)
    peft.get_peft_model(model, config).save_pretrained(damaged)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(damaged)
    assert any("lora_A" in name for name, _ in loaded.named_parameters()), "the reason why it is refused"
    assert f"{damaged / 'adapter_config.json'}: an adapter lies beside the model's weights" in refused(damaged)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_a_base_saved_without_its_head_is_whole_if_tied(tmp_path: Path, kind: str) -> None:
    """Names without the base model's prefix, as a model without a head is saved: the head is the embedding."""
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**settings, tie_word_embeddings=True)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    check(tmp_path)
    assert "lm_head.weight" in refused(configure(tmp_path, tie_word_embeddings=False))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights_are_checked_too(damaged: Path, is_zip: bool) -> None:
    """A .bin file's names and shapes are read without its tensors; what it lacks is named."""
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    path = damaged / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    check(damaged)
    del tensors[UP_PROJECTION]
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    assert f"pytorch_model.bin: lacks {UP_PROJECTION}, which" in refused(damaged)
    path.write_bytes(path.read_bytes()[:-200])
    assert "pytorch_model.bin: cannot be read" in refused(damaged)


MASK_8 = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
LEFT_OVER = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "gptj": {"transformer.h.0.attn.bias": MASK_8, "transformer.h.0.attn.masked_bias": torch.tensor(-1e9)},
    "codegen": {"transformer.h.1.attn.causal_mask": MASK_8},
    "gpt2": {"h.0.attn.bias": MASK_8, "h.1.attn.masked_bias": torch.tensor(-1e4)},  # as the hub's gpt2: without prefix
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": MASK_8,
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    },
}
"""Buffers of attention that old versions of transformers saved."""


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_what_older_versions_saved_besides_is_no_fault(tmp_path: Path, kind: str) -> None:
    """Causal masks and rotary frequencies of old checkpoints, and modules that the model lacks, change nothing."""
    absent = {"v_head.summary.weight": torch.ones(1, 32), "model.vision_tower.proj.weight": torch.ones(2, 2)}
    folder = build(tmp_path, kind)
    check(change(folder, lambda tensors: tensors.update(LEFT_OVER[kind] | absent)))
    load_weights(str(folder), dtype=torch.float32)


def test_a_config_of_another_model_is_refused(damaged: Path) -> None:
    """More layers, fewer layers, another vocabulary, and Qwen3's config over Llama's weights, each by a tensor."""
    assert "lacks model.layers.2." in refused(configure(damaged, num_hidden_layers=3, layer_types=None))
    assert "holds model.layers.1." in refused(configure(damaged, num_hidden_layers=1))
    message = refused(configure(damaged, num_hidden_layers=2, vocab_size=128))
    assert "lm_head.weight has shape [96, 32], expected [128, 32]" in message
    configure(damaged, vocab_size=96, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8)
    assert "self_attn.q_norm.weight (and 3 others), which its config.json asks for" in refused(damaged)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.down_proj", "input_layernorm", "mlp.act_fn"])
def test_a_tensor_without_a_place_is_refused(damaged: Path, module: str) -> None:
    """A bias that config.json does not know would be left out of the model; it is no old mask."""
    name = f"model.layers.0.{module}.bias"
    assert f"holds {name}, for which" in refused(
        change(damaged, lambda tensors: tensors.update({name: torch.ones(32)}))
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda whole: whole[:-100], "cut or damaged"),
        (lambda whole: whole[:20], "cut or damaged"),
        (lambda whole: b"", "it is empty"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (lambda whole: b"<html>" + whole[6:], "cut or damaged"),
    ],
    ids=["cut", "cut in the header", "empty", "pointer", "page"],
)
def test_a_file_that_holds_no_weights_is_refused(damaged: Path, content: Any, expected: str) -> None:
    """The file is named, and what to do."""
    path = damaged / "model.safetensors"
    path.write_bytes(content(path.read_bytes()))
    message = refused(damaged)
    assert f"{path}: cannot be read" in message
    assert expected in message


def test_an_index_names_files_of_its_own_folder(tmp_path: Path) -> None:
    """A shard that is not there is named; a path that leads out of the folder is never followed."""
    folder = build(tmp_path / "model", "llama", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    content = index.read_text()
    shutil.copy(shard, tmp_path / shard.name)
    for elsewhere in (f"../{shard.name}", str(tmp_path / shard.name)):
        index.write_text(content.replace(shard.name, elsewhere))
        assert "expected only files in the model's own folder" in refused(folder)
    index.write_text(content)
    check(folder)
    shard.unlink()
    assert f"{shard}: cannot be read" in refused(folder)


def test_loading_refuses_what_the_headers_would_have_shown(damaged: Path) -> None:
    """A second look, after loading: nothing that was drawn at random is trained on or talked to."""
    change(damaged, lambda tensors: tensors.pop(UP_PROJECTION))
    with pytest.raises(UserError, match=f"lacks {UP_PROJECTION}"):
        load_weights(str(damaged), dtype=torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name(damaged: Path, value: float) -> None:
    """One such value in one tensor; headers cannot show it, so it is found where the weights are read."""
    change(damaged, lambda tensors: tensors[UP_PROJECTION][3].fill_(value))
    check(damaged)
    with pytest.raises(UserError, match=f"{UP_PROJECTION} holds NaN or infinity"):
        load_weights(str(damaged), dtype=torch.bfloat16)


def test_all_finite_values_are_finite() -> None:
    """The largest numbers of a type, empty and integer tensors are no fault."""
    tensors = {
        "large": torch.full((3,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "integer": torch.ones(2, dtype=torch.int8),
        "four bits": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    assert first_non_finite(tensors.items()) is None


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_eight_bit_numbers_are_checked(name: str) -> None:
    """The extremes of each type of 8 bits are finite; its NaN is found."""
    dtype = getattr(torch, name)
    extremes = torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max]).to(dtype)
    assert first_non_finite([("weight", extremes)]) is None
    extremes[0] = torch.nan
    assert first_non_finite([("weight", extremes)]) == "weight"


def sharded(values: Tensor, *, rank: int, numel: int, in_memory: bool = True) -> torch.nn.Parameter:
    """A parameter with what DeepSpeed adds to it: a shard of it, or the one number that stays if that is on a disk."""
    parameter: Any = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.ds_numel, parameter.ds_zero_partition_rank = numel, rank
    parameter.ds_tensor = values if in_memory else torch.tensor(1.0)
    parameter.ds_tensor.ds_numel = len(values)
    return parameter  # type: ignore[no-any-return]


def test_a_shard_is_read_where_it_lies_in_memory() -> None:
    """Seven values on two ranks: four, then three and one of padding. On a disk: none, not what stands for them."""
    shard = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    assert torch.equal(own_values(sharded(shard, rank=0, numel=7)).nan_to_num(0), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert own_values(sharded(shard, rank=1, numel=7)).tolist() == [1.0, 2.0, 3.0]
    assert own_values(sharded(shard, rank=0, numel=7, in_memory=False)).tolist() == []
