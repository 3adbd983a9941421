"""Adapters as other versions and packages write them: read, merged and rewritten by PEFT's names, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import build_tiny_model
from toy import saved_adapter, toy_policy
from transformers import AutoModelForCausalLM

from uft_ds.errors import UserError
from uft_ds.export.convert import convert_to_adapter, convert_to_merged
from uft_ds.export.low_rank import read_low_rank
from uft_ds.streams.adapters import start_from_adapter
from uft_ds.streams.identity import adapter_identity

PREFIX = "base_model.model."
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def renamed(folder: Path, rename: Rename, *, pickled: bool = False) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    if pickled:
        path.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, path)


def configure(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FORMS: dict[str, tuple[Rename, bool]] = {
    "a model's own names": (lambda name: name.replace(".weight", ".default.weight"), False),
    "without PEFT's prefix": (lambda name: name.removeprefix(PREFIX), False),
    "neither": (lambda name: name.removeprefix(PREFIX).replace(".weight", ".default.weight"), False),
    "inside another model": (lambda name: f"actor.module.{name}", False),
    "pickled": (lambda name: name, True),
    "pickled, without the prefix": (lambda name: name.removeprefix(PREFIX), True),
}


@pytest.mark.parametrize("form", long_but(("neither", "pickled"), FORMS))
def test_other_names_and_files_are_read_as_pefts(base: Path, adapter: Path, copy: Path, form: str) -> None:
    """Merged and compared; copied as an adapter that PEFT loads; started from as a reference."""
    rename, pickled = FORMS[form]
    renamed(copy, rename, pickled=pickled)
    tmp_path = copy.parent
    result = convert_to_merged(copy, tmp_path / "merged", base=str(base), say=lambda _: None)
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
    convert_to_adapter(copy, tmp_path / "again", base=str(base))
    expected = load_file(adapter / "adapter_model.safetensors")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "again"))
    assert any(tensor.any() for name, tensor in policy.named_parameters() if "lora_B" in name)
    start_from_adapter(toy_policy(base), copy)
    assert len(adapter_identity(copy)) == 64


def test_a_tensor_under_two_names_is_refused(copy: Path) -> None:
    """Which of the two was meant, nobody knows."""
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name.removeprefix(PREFIX): tensors[name] + 1}, path)
    with pytest.raises(UserError, match="holds this tensor twice"):
        read_low_rank(copy)


def test_a_pickle_that_holds_more_than_tensors_is_refused(base: Path, copy: Path) -> None:
    """Nothing in it is executed; without any file, both names are expected."""
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no such file.*adapter_model\.safetensors or adapter_model\.bin"):
        convert_to_merged(copy, copy.parent / "merged", base=str(base))
    torch.save({"lora_A": Path("/tmp")}, copy / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin: cannot be read: it is damaged, or holds other"):
        convert_to_merged(copy, copy.parent / "merged", base=str(base))


def test_fields_that_ask_for_nothing_are_passed_over(base: Path, copy: Path) -> None:
    """PEFT 0.2 wrote two that PEFT no longer knows; what is written has only PEFT's. One that asks is refused."""
    configure(copy, enable_lora=None, merge_weights=False, lora_extra=[], other={})
    convert_to_merged(copy, copy.parent / "merged", base=str(base), say=lambda _: None)
    convert_to_adapter(copy, copy.parent / "again", base=str(base))
    assert "enable_lora" not in json.loads((copy.parent / "again" / "adapter_config.json").read_text())
    start_from_adapter(toy_policy(base), copy)
    configure(copy, enable_lora=[True, False])
    with pytest.raises(UserError, match=r"enable_lora: \[True, False\]: not known to the installed PEFT.*another"):
        read_low_rank(copy)


def test_an_adapter_of_empty_tensors_is_not_copied(base: Path, copy: Path) -> None:
    """As it is saved under ZeRO-3 without gathering; nothing is left at the target."""
    path = copy / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(path)}, path)
    with pytest.raises(UserError, match=r"expected A of \[rank, in\].*saved under ZeRO-3 without gathering"):
        convert_to_adapter(copy, copy.parent / "again", base=str(base))
    assert not (copy.parent / "again").exists()


def test_a_side_of_one_dimension_is_refused(base: Path, copy: Path) -> None:
    """By the name of its layer, A and B alike."""
    path = copy / "adapter_model.safetensors"
    stored = load_file(path)
    for side in ("A", "B"):
        name = next(name for name in stored if f"lora_{side}" in name)
        save_file(stored | {name: stored[name][:, 0].contiguous()}, path)
        with pytest.raises(UserError, match=r"found {'A': \[\d+.*'B': \[\d+.*expected A of \[rank, in\]"):
            convert_to_merged(copy, copy.parent / "out", base=str(base), verify=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": "4"}, "r: '4' found, expected a whole number from 1 on"),
        ({"r": True}, "r: True found"),
        ({"r": 0}, "r: 0 found"),
        ({"r": 4.0}, "r: 4.0 found"),
        ({"lora_alpha": "x"}, "lora_alpha: 'x' found, expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha: None found"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan found"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf found"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' found, expected true or false"),
        ({"rank_pattern": [1]}, "rank_pattern: [1] found, expected an object"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: {'(': 4} found"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: {'q_proj': '4'} found"),
        ({"alpha_pattern": 5}, "alpha_pattern: 5 found"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: {'q_proj': None} found"),
        ({"target_modules": [1]}, "target_modules: [1] found"),
        ({"target_modules": "("}, "target_modules: '(' found"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: 5 found, expected a name or a path"),
        ({"peft_type": None}, "peft_type: None found, expected 'LORA'"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused_by_their_field(
    base: Path, copy: Path, change: dict[str, Any], expected: str
) -> None:
    """With the file's name, by convert and as a reference."""
    configure(copy, **change)
    start = f"{copy / 'adapter_config.json'}: "
    with pytest.raises(UserError) as caught:
        convert_to_merged(copy, copy.parent / "out", base=str(base), verify=False)
    assert str(caught.value).startswith(start + expected)
    with pytest.raises(UserError) as caught:
        start_from_adapter(toy_policy(base), copy)
    assert str(caught.value).startswith(f"reference.adapter: {start}{expected}")


def test_an_adapter_of_8_bit_numbers_is_merged(base: Path, copy: Path) -> None:
    """torch cannot ask whether such numbers are finite; they are read as float32."""
    path = copy / "adapter_model.safetensors"
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
    save_file(stored, path)
    for name, low_rank in read_low_rank(copy).items():
        a, b = (stored[f"{PREFIX}{name.removesuffix('.weight')}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(low_rank.delta(), b @ a * low_rank.scale)


def test_an_adapter_of_integers_is_refused(copy: Path) -> None:
    """They would be taken for the numbers, by PEFT too."""
    path = copy / "adapter_model.safetensors"
    save_file({name: (100 * tensor).to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"lora_[AB]: stored as int8: it is quantised"):
        read_low_rank(copy)
