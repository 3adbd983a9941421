"""Checkpoints that DeepSpeed itself has written become adapters and models; nothing in them is ever run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, engine_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import build_tiny_model
from toy import UFT, toy_step
from transformers import AutoModelForCausalLM

from uft_ds.data.packing import rank_micro_batches
from uft_ds.errors import UserError
from uft_ds.export.convert import convert_to_adapter, convert_to_merged
from uft_ds.export.deepspeed_files import find_tag, read_trainable


def saved_by_deepspeed(base: Path, folder: Path, file: str, exclude_frozen: bool) -> Any:
    """One step, and the adapter as it then is, whole."""
    engine = engine_of(base, file=file)
    batches = rank_micro_batches(toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size)
    accumulate(engine, batches, UFT)
    engine.step(1e-2)
    engine.deepspeed.empty_partition_cache()
    engine.deepspeed.save_checkpoint(str(folder), tag="tag1", exclude_frozen_parameters=exclude_frozen)
    model: Any = engine.module
    with engine.gathered_trainable() as named:
        tensors = {name.removeprefix("policy."): tensor.clone() for name, tensor in named.items()}
    if engine.rank == 0:
        model.policy.peft_config["default"].save_pretrained(str(folder / "config"))
    return get_peft_model_state_dict(model.policy, state_dict=tensors)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=False)


@pytest.mark.parametrize(
    ("file", "ranks", "exclude_frozen"),
    [
        ("zero3_cpu", 2, True),
        pytest.param("zero3_cpu", 3, False, marks=pytest.mark.long),
        ("zero2", 2, True),
        pytest.param("zero2", 1, False, marks=pytest.mark.long),
    ],
)
def test_a_deepspeed_folder_becomes_an_adapter_and_a_model(
    base: Path, tmp_path: Path, file: str, ranks: int, exclude_frozen: bool
) -> None:
    """The very tensors, and a model whose logits are those of base and adapter."""
    folder = tmp_path / "deepspeed"
    expected = run_on_ranks(saved_by_deepspeed, ranks, base, folder, file, exclude_frozen)[0]
    config = folder / "config"
    convert_to_adapter(folder, tmp_path / "adapter", base=str(base), adapter_config=config)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    result = convert_to_merged(folder, tmp_path / "merged", base=str(base), adapter_config=config, say=lambda _: None)
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
    ids = torch.arange(3, 20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4


def saved_by_a_plain_loop(base: Path, folder: Path, zero: dict[str, Any], bf16: bool | None) -> Any:
    """PEFT and DeepSpeed as anyone uses them, nothing of ours: a step of cross-entropy, then save_checkpoint.

    bf16: None: with float32 gradients, for which DeepSpeed has another optimiser at stage 1.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    dtype = torch.float32 if bf16 is False else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    policy = get_peft_model(model, LoraConfig(r=5, lora_alpha=6, target_modules="all-linear", use_rslora=True))
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    halves = [trainable[:5], trainable[5:]]  # two groups, as for another rate
    optimizer = torch.optim.AdamW([{"params": half, "lr": 1e-2} for half in halves])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16 is not False},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 is None else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    ids = torch.arange(3, 20)[None]
    engine.backward(engine(ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(folder))
    if engine.global_rank == 0:
        policy.peft_config["default"].save_pretrained(str(folder / "config"))
    return {name: safe_get_full_fp32_param(p).clone() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("zero", "bf16"),
    [
        pytest.param({"stage": 1}, True, marks=pytest.mark.long),
        pytest.param({"stage": 2}, True, marks=pytest.mark.long),
        ({"stage": 3}, True),
        pytest.param({"stage": 3, "offload_optimizer": {"device": "cpu"}}, False, marks=pytest.mark.long),
        ({"stage": 2, "parameter_alignment": True}, False),
        pytest.param({"stage": 1}, None, marks=pytest.mark.long),
    ],
    ids=["zero1", "zero2", "zero3", "offloaded", "aligned", "BF16_Optimizer"],
)
def test_a_folder_that_others_have_written_becomes_an_adapter(
    base: Path, tmp_path: Path, zero: dict[str, Any], bf16: bool | None
) -> None:
    """bfloat16 or not, with two groups of parameters and the base's weights in it: the float32 masters, bit for bit."""
    folder = tmp_path / "deepspeed"
    expected = run_on_ranks(saved_by_a_plain_loop, 2, base, folder, zero, bf16)[0]
    found = read_trainable(folder)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    result = convert_to_merged(
        folder, tmp_path / "merged", base=str(base), adapter_config=folder / "config", say=lambda _: None
    )
    assert result.agreement is not None
    assert result.agreement.is_faithful


class Hostile:
    """Unpickled without care, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(saved_by_deepspeed, 2, base, folder, "zero3_cpu", True)
    return folder


@pytest.mark.parametrize("pattern", ["*rank_0_*optim_states", "*rank_1_*optim_states", "*rank_0_*model_states"])
def test_code_in_a_pickle_is_never_run(saved: Path, tmp_path: Path, pattern: str) -> None:
    """In any file: refused by name, and what it would have done is not done."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (path,) = (folder / "tag1").glob(f"{pattern}.pt")
    torch.save({"optimizer_state_dict": Hostile(tmp_path / "owned"), "param_shapes": Hostile(tmp_path / "owned")}, path)
    with pytest.raises(UserError, match=rf"{path}: refused: it holds more than tensors"):
        read_trainable(folder)
    assert not (tmp_path / "owned").exists()


def test_damage_is_named(saved: Path, tmp_path: Path) -> None:
    """A cut file, a missing rank, no names; a `latest` that leads nowhere, and none at all."""

    def copy(name: str) -> Path:
        shutil.copytree(saved, tmp_path / name)
        return tmp_path / name

    cut = copy("cut")
    path = next((cut / "tag1").glob("*rank_1_*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        read_trainable(cut)
    lost = copy("lost")
    next((lost / "tag1").glob("*rank_0_*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="2 ranks wrote it; the optimiser's state of rank 0 is missing"):
        read_trainable(lost)
    last = copy("last")
    next((last / "tag1").glob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="2 ranks wrote it; the optimiser's state of rank 1 is missing"):
        read_trainable(last)
    flipped = copy("flipped")
    path = next((flipped / "tag1").glob("*rank_1_*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: damaged \(BadZipFile"):
        read_trainable(flipped)
    other = copy("other")
    path = next((other / "tag1").glob("*rank_1_*optim_states.pt"))
    torch.save({"optimizer_state_dict": {"zero_stage": 3}}, path)
    with pytest.raises(UserError, match=rf"{path}: not a rank's optimiser state \(KeyError"):
        read_trainable(other)
    nameless = copy("nameless")
    for states in (nameless / "tag1").glob("*model_states.pt"):
        states.unlink()
    with pytest.raises(UserError, match="which names the parameters"):
        read_trainable(nameless)
    stale = copy("stale")
    (stale / "latest").write_text("tag9")
    with pytest.raises(UserError, match="names 'tag9', where no checkpoint is; there are tag1"):
        find_tag(stale)
    (stale / "latest").unlink()
    assert find_tag(stale).name == "tag1"
    assert find_tag(stale / "tag1") == stale / "tag1"
    with pytest.raises(UserError, match="holds no DeepSpeed checkpoint"):
        find_tag(tmp_path)


def test_files_of_another_save_are_found(saved: Path, base: Path, tmp_path: Path) -> None:
    """A tag that three ranks had written before two did: the third file belongs to other weights."""
    folder = tmp_path / "twice"
    run_on_ranks(saved_by_deepspeed, 3, base, folder, "zero3_cpu", True)
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"its files are of several saves \(of 2, 3 ranks, there are 3 files\)"):
        read_trainable(folder)


def test_a_config_that_does_not_fit_is_refused(saved: Path, base: Path, tmp_path: Path) -> None:
    """Also where only the adapter is written."""
    config = json.loads((saved / "config" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(UserError, match="has rank 4, its config says 8"):
        convert_to_adapter(saved, tmp_path / "out", base=str(base), adapter_config=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_asked_for(saved: Path, base: Path, tmp_path: Path) -> None:
    """Both options in one message; a base for a run's own checkpoint is refused."""
    with pytest.raises(UserError, match=r"holds weights alone; give --base and --adapter-config"):
        convert_to_adapter(saved, tmp_path / "out")
    with pytest.raises(UserError, match=r"give --adapter-config"):
        convert_to_adapter(saved, tmp_path / "out", base=str(base))
