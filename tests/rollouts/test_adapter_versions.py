"""Folders of adapters for a server: whole and checked, or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from policies import TinyPolicy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from uft_ds.errors import CheckFailed, UserError
from uft_ds.rollouts import adapter_versions
from uft_ds.rollouts.adapter_versions import (
    Adapters,
    check_servable,
    check_version,
    check_whole,
    delete_old,
    version_name,
    write_version,
)
from uft_ds.rollouts.answers import PolicyVersion


@pytest.fixture(scope="module")
def policy(tiny_qwen2: Path) -> TinyPolicy:
    return TinyPolicy(tiny_qwen2)


def changed(config: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(config) | fields).encode()


def test_peft_loads_what_was_written(policy: TinyPolicy, tiny_qwen2: Path, tmp_path: Path) -> None:
    """PEFT's own loading of the folder gives the logits of the tensors in memory, and no warning of a missing key."""
    version, tensors = policy.version(1)
    path = write_version(Adapters(tmp_path, policy.config, "r"), version, tensors)
    assert path == tmp_path / version_name(version, policy.config)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen2), path)
    ids = torch.tensor([[80, 90, 100, 110]])
    set_peft_model_state_dict(policy.model, tensors)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_it_is_readable_by_another_user(policy: TinyPolicy, tmp_path: Path) -> None:
    """Servers may run as someone else: the folder and its files have the rights of any new file."""
    path = write_version(Adapters(tmp_path, policy.config, "r"), *policy.version(1))
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert all(file.stat().st_mode & 0o444 == 0o444 & ~umask for file in path.iterdir())


def test_views_of_one_buffer_are_written(policy: TinyPolicy, tmp_path: Path) -> None:
    """Gathered tensors may share one storage, transposed too."""
    version, tensors = policy.version(1)
    buffer = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = buffer[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    views = {name: view.T.contiguous().T for name, view in views.items()}
    path = write_version(Adapters(tmp_path, policy.config, "r"), version, views)
    read = load_file(path / "adapter_model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("what", ["left whole", "left damaged", "left with another config", "left in part"])
def test_what_an_earlier_start_has_left_is_made_right(policy: TinyPolicy, tmp_path: Path, what: str) -> None:
    """The same folder is kept as it is, and a wrong one is replaced."""
    version, tensors = policy.version(1)
    adapters = Adapters(tmp_path, policy.config, "r")
    path = write_version(adapters, version, tensors)
    weights = path / "adapter_model.safetensors"
    number = weights.stat().st_ino
    if what == "left damaged":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    elif what == "left with another config":
        (path / "adapter_config.json").write_bytes(changed(policy.config, lora_alpha=16))
    elif what == "left in part":
        weights.write_bytes(weights.read_bytes()[:100])
    write_version(adapters, version, tensors)
    check_version(path, policy.config, tensors)
    assert (weights.stat().st_ino == number) == (what == "left whole")


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, make: Any) -> Any:
    return lambda tensors: tensors.update({name: make(tensors[name])})


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def every(tensors: dict[str, torch.Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(A), "has lora_B alone"),
        (without(B), "has lora_A alone"),
        (lambda tensors: every(tensors, ".down_proj."), r"no tensor of a layer '.*down_proj'"),
        (lambda tensors: tensors.clear(), "no tensors"),
        (replaced(A, lambda t: torch.cat([t, t])), r"shape \[8, 64\]: expected lora_A of \[4, in\]"),
        (replaced(B, lambda t: t[:, :3]), r"lora_B of \[out, 4\]"),
        (replaced(A, lambda t: t * float("nan")), "NaN"),
        (replaced(B, lambda t: t.clone().fill_(float("inf"))), "NaN or infinity"),
        (replaced(B, lambda t: t[:0]), "is empty"),
        (replaced(B, lambda t: t.bfloat16()), "several types"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3, 4)}), "lm_head"),
        (
            lambda tensors: tensors.update(
                {
                    "base_model.model.model.layers.0.gate.lora_A.weight": torch.ones(4, 3),
                    "base_model.model.model.layers.0.gate.lora_B.weight": torch.ones(3, 4),
                }
            ),
            "no target of the config",
        ),
    ],
)
def test_what_is_not_the_whole_adapter_is_refused(policy: TinyPolicy, tmp_path: Path, change: Any, words: str) -> None:
    """A server would load each of these with status 200, or for a long time; nothing is left on the disk."""
    version, tensors = policy.version(1)
    change(tensors)
    with pytest.raises(CheckFailed, match=words):
        write_version(Adapters(tmp_path, policy.config, "r"), version, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{"r": 8}, {"lora_alpha": float("nan")}, {"lora_alpha": 0}])
def test_a_config_of_another_adapter_is_refused(policy: TinyPolicy, fields: dict[str, Any]) -> None:
    """The scale is alpha / r of the config, whatever the tensors are."""
    with pytest.raises(CheckFailed, match=r"rank 8|lora_alpha"):
        check_whole(changed(policy.config, **fields), policy.version(1)[1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read back"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "not what was written"),
        (
            lambda folder: save_file(
                {n: t.bfloat16() for n, t in load_file(folder / "adapter_model.safetensors").items()},
                folder / "adapter_model.safetensors",
            ),
            "not what was written|bfloat16",
        ),
        (
            lambda folder: save_file(
                dict(list(load_file(folder / "adapter_model.safetensors").items())[:-1]),
                folder / "adapter_model.safetensors",
            ),
            "tensors read back",
        ),
    ],
)
def test_what_came_back_otherwise_from_the_disk_is_refused(
    policy: TinyPolicy, tmp_path: Path, damage: Any, words: str
) -> None:
    """The folder is read again before it counts."""
    version, tensors = policy.version(1)
    path = write_version(Adapters(tmp_path, policy.config, "r"), version, tensors)
    damage(path)
    with pytest.raises(CheckFailed, match=words):
        check_version(path, policy.config, tensors)


def test_a_folder_is_whole_or_absent(policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails in the middle leaves nothing under the version's name, and says where it failed."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_versions, "sync", full)
    with pytest.raises(UserError, match="No space left"):
        write_version(Adapters(tmp_path, policy.config, "r"), *policy.version(1))
    assert not list(tmp_path.iterdir())


def test_the_last_two_versions_are_kept(policy: TinyPolicy, tmp_path: Path) -> None:
    """The current one and the one written before it, also if a resumed run goes back to an earlier step; no others."""
    adapters = Adapters(tmp_path, policy.config, "r")
    (tmp_path / "someone's").mkdir()
    (tmp_path / ".000009-00000000.0123abcd.tmp").mkdir()
    names = []
    for step in (5, 6, 7, 3):
        path = write_version(adapters, *policy.version(step))
        os.utime(path, ns=(step + 10**18, len(names) * 10**9 + 10**18))
        names.append(path.name)
        delete_old(tmp_path, path)
        assert {one.name for one in tmp_path.iterdir()} == {"someone's", *names[-2:]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["model.embed_tokens"]}, "embed_tokens"),
        ({"r": 1024}, "at most 512"),
    ],
)
def test_what_servers_cannot_take_is_refused_before_a_launch(
    policy: TinyPolicy, fields: dict[str, Any], words: str
) -> None:
    """By the recipe's key."""
    with pytest.raises(UserError, match=words) as raised:
        check_servable(changed(policy.config, **fields))
    assert str(raised.value).startswith("lora")


def test_a_plain_adapter_is_taken_up_to_the_servers_rank(policy: TinyPolicy) -> None:
    """The limit itself is allowed."""
    check_servable(policy.config)
    check_servable(policy.config, max_rank=4)
    with pytest.raises(UserError, match=r"lora\.rank: 4 given, at most 3"):
        check_servable(policy.config, max_rank=3)


def test_names_sort_by_steps_and_are_safe_in_urls(policy: TinyPolicy) -> None:
    """A run's name may hold anything."""
    names = [version_name(PolicyVersion(step, "00"), policy.config) for step in (0, 9, 10, 123456)]
    assert names == sorted(names)
    named = Adapters(Path("/x"), policy.config, "my run/ü:1").named(names[0])
    assert named == f"uft-my-run---1-{names[0]}"
