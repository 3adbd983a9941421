"""A merged model, written tensor by tensor, is what PEFT makes of base and adapter with both in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from log_probs import hugging_face_logps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import build_tiny_model
from toy import saved_adapter, toy_sequences
from transformers import AutoModelForCausalLM

from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.agreement import compare
from uft_ds.export.convert import StoredAs, convert_to_adapter, convert_to_merged
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.merge import write_merged
from uft_ds.export.streamed_logps import empty_model, streamed_logps, with_adapter
from uft_ds.streams.load import check_base
from uft_ds.streams.weight_files import WeightFiles, bytes_of

SMALL = 40_000
"""Bytes: a tiny model has several files then."""


@pytest.fixture(scope="module", params=long_but(["qwen2"], ["llama", "qwen2", "qwen3", "mistral"]))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param in ("llama", "qwen3")
    return build_tiny_model(tmp_path_factory.mktemp(request.param), request.param, tied=tied)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(base, tmp_path_factory.mktemp("adapter"))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("max_bytes", [SMALL, 10**9], ids=["several files", "one file"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_merge_is_pefts(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype | None, max_bytes: int) -> None:
    """Bit for bit in float32; rounded once into another type. transformers loads it, index and all."""
    write_merged(WeightFiles(base), read_low_rank(adapter), tmp_path, dtype=dtype, max_shard_bytes=max_bytes)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_bytes == SMALL)
    theirs = PeftModel.from_pretrained(loaded(base), str(adapter)).merge_and_unload().state_dict()
    stored = {info.name: info.dtype for info in WeightFiles(base).infos.values()}
    found = state_of(tmp_path)
    assert set(found) == set(stored)
    for name, tensor in found.items():
        assert tensor.dtype == (dtype or stored[name])
        expected = theirs[name]
        assert (tensor.float() - expected.to(tensor.dtype).float()).abs().max() <= 1e-6, name
    ours = loaded(tmp_path).state_dict()
    assert set(ours) == set(theirs)


def test_streamed_log_probs_are_hugging_faces(base: Path, adapter: Path) -> None:
    """Layer by layer, all sequences packed: the same as each alone with the whole model in memory; twice in a row."""
    sequences = toy_sequences(5)
    config = check_base(str(base), None)
    policy = with_adapter(empty_model(config), adapter)
    whole = PeftModel.from_pretrained(loaded(base), str(adapter)).eval()
    for adapters in (True, False, True):
        streamed = streamed_logps(policy, WeightFiles(base), sequences, adapters=adapters)
        expected = hugging_face_logps(whole, sequences, adapters=adapters)
        assert (streamed - expected).abs().max() < 1e-4
    assert all(p.is_meta for name, p in policy.named_parameters() if "lora_" not in name), "empty again"


def test_a_merge_that_loses_something_is_seen(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Kept in float32; with the adapter's effect halved, share and error say so."""
    deltas = read_low_rank(adapter)
    halved = {name: type(d)(d.a, d.b, d.scale / 2) for name, d in deltas.items()}
    for name, chosen in (("whole", deltas), ("halved", halved)):
        folder = tmp_path / name
        folder.mkdir()
        write_merged(WeightFiles(base), chosen, folder, dtype=torch.float32, max_shard_bytes=SMALL)
        (folder / "config.json").write_text((base / "config.json").read_text())
        found = compare(base, adapter, folder, toy_sequences(5))
        assert found.is_faithful == (name == "whole")
        assert found.share_kept == pytest.approx(1.0 if name == "whole" else 0.5, abs=0.1 if name == "halved" else 1e-3)


def test_an_adapter_becomes_a_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """From PEFT's folder alone, with a card; what it was compared on is said, and nothing is left beside it."""
    seen: dict[str, list[tuple[int, int]]] = {}
    result = convert_to_merged(
        adapter,
        tmp_path / "merged",
        base=str(base),
        stored=StoredAs(max_shard_bytes=SMALL),
        say=lambda _: None,
        on_progress=lambda label, done, total: seen.setdefault(label, []).append((done, total)),
    )
    assert list(seen) == ["writing weights", "comparing layers"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {base}\n")
    assert "of the adapter's log-ratios kept on" in card
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    with pytest.raises(UserError, match="already exists"):
        convert_to_merged(adapter, tmp_path / "merged", base=str(base))


def test_a_weight_that_does_not_fit_its_type_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """float16 ends at 65504; also without the comparison, which would find it too."""
    large = tmp_path / "large"
    shutil.copytree(base, large)
    tensors = load_file(large / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 0] = 1e5
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}: not finite as torch.float16; take another --dtype"):
        convert_to_merged(
            adapter, tmp_path / "out", base=str(large), stored=StoredAs("float16"), verify=False, say=print
        )
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_too_little_room_is_said_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes."""
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"[0-9.e-]+ GB needed for the weights, 1e-06 GB free"):
        convert_to_merged(adapter, tmp_path / "out", base=str(base), say=print)
    assert not list(tmp_path.iterdir())


def test_a_delta_too_small_for_the_type_is_refused(base: Path, tmp_path: Path) -> None:
    """And float32 is offered; nothing is left."""
    small = saved_adapter(base, tmp_path / "small")
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({n: t * (1e-4 if "lora_B" in n else 1) for n, t in tensors.items()}, small / "adapter_model.safetensors")
    with pytest.raises(CheckFailed, match="convert with --dtype float32, or take the adapter"):
        convert_to_merged(small, tmp_path / "out", base=str(base), stored=StoredAs("bfloat16"), say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias: 'all' found, expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\] found, expected None"),
        ({"use_dora": True}, "use_dora: True found, expected False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's weights too"),
        ({"lora_bias": True}, "lora_bias: True found"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True found"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' found, expected 'LORA'"),
        ({"from_the_future": 1}, "from_the_future: 1: not known to the installed PEFT"),
        ({"r": 8}, "has rank 4, its config says 8"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(adapter: Path, tmp_path: Path, change: Any, message: str) -> None:
    """Merging the rest of it would make another model, silently."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        read_low_rank(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_scales_are_pefts(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Rank-stabilised, of a pattern, of some modules only."""
    policy: Any = get_peft_model(
        loaded(base), LoraConfig(r=4, lora_alpha=7, **{"target_modules": "all-linear"} | options)
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    policy.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    deltas = read_low_rank(tmp_path / "adapter")
    write_merged(WeightFiles(base), deltas, tmp_path / "out", dtype=torch.float32, max_shard_bytes=SMALL)
    theirs = policy.merge_and_unload().state_dict()
    for name, tensor in state_of(tmp_path / "out").items():
        assert (tensor - theirs[name]).abs().max() <= 1e-6, name


def test_an_adapter_of_another_model_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """By the weight that is not there, or has another shape."""
    deltas = read_low_rank(adapter)
    name, delta = next(iter(deltas.items()))
    with pytest.raises(UserError, match=r"holds no nothing\.weight"):
        write_merged(WeightFiles(base), {"nothing.weight": delta}, tmp_path, dtype=None, max_shard_bytes=SMALL)
    wide = type(delta)(torch.zeros(4, 999), delta.b, 1.0)
    with pytest.raises(UserError, match=rf"{name} has shape .*999"):
        write_merged(WeightFiles(base), {name: wide}, tmp_path, dtype=None, max_shard_bytes=SMALL)


def test_sizes_are_read_as_people_write_them() -> None:
    """Decimal and binary; nonsense is refused."""
    assert [bytes_of(text) for text in ("5GB", "1.5 MB", "2GiB", "1kb")] == [5 * 10**9, 1_500_000, 2**31, 1000]
    for text in ("", "5", "GB", "-1GB", "0GB", "5 bytes"):
        with pytest.raises(UserError, match="--max-shard-size"):
            bytes_of(text)


def test_an_adapter_is_copied(adapter: Path, tmp_path: Path) -> None:
    """As it is; options that would change nothing are refused."""
    convert_to_adapter(adapter, tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UserError, match="--adapter-config"):
        convert_to_adapter(adapter, tmp_path / "again", adapter_config=adapter)
    with pytest.raises(UserError, match="no such folder"):
        convert_to_adapter(tmp_path / "nowhere", tmp_path / "again")


def test_an_adapter_of_the_head_is_compared(tmp_path: Path) -> None:
    """A linear outside the layers keeps its adapter in memory from pass to pass, whether the head is tied or not."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    adapter = tmp_path / "adapter"
    policy = get_peft_model(loaded(base), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    policy.save_pretrained(str(adapter), save_embedding_layers=False)
    result = convert_to_merged(adapter, tmp_path / "merged", base=str(base), say=lambda _: None)
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)


def test_a_generation_config_that_transformers_would_not_save_is_kept(tmp_path: Path) -> None:
    """Well-known models have a temperature without do_sample."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    adapter = saved_adapter(base, tmp_path / "adapter")
    convert_to_merged(adapter, tmp_path / "merged", base=str(base), say=lambda _: None, verify=False)
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"]) == (0.9, 0.6)
    assert isinstance(found["eos_token_id"], list)
