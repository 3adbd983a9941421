"""Adapters of routed experts are merged into the files' tensors of single experts, and foreign ones are checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from suites import long_but
from transformers import AutoModelForCausalLM

from uft_ds.errors import UserError
from uft_ds.export.convert import convert_to_merged
from uft_ds.export.low_rank import read_adapter_config

WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter_of(base: Path, folder: Path, parameters: list[str]) -> Path:
    """PEFT's own, with B drawn."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=parameters)
    policy = get_peft_model(loaded(base), config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    policy.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(20, 60)[None]).logits
    return found


@pytest.mark.parametrize(
    "parameters", long_but([WEIGHTS], [WEIGHTS, WEIGHTS[:1], WEIGHTS[1:]]), ids=["both", "gate_up", "down"]
)
def test_adapters_of_experts_are_merged_as_peft_computes_them(
    mixture: Path, tmp_path: Path, parameters: list[str]
) -> None:
    """Hugging Face's logits of the merged files are those of PEFT's adapter on the base; the log-ratios agree too."""
    adapter = adapter_of(mixture, tmp_path / "adapter", parameters)
    result = convert_to_merged(adapter, tmp_path / "merged", base=str(mixture), say=lambda _: None)
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
    base, expected = loaded(mixture), logits(PeftModel.from_pretrained(loaded(mixture), str(adapter)))
    assert (logits(base) - expected).abs().max() > 1e-3
    merged = loaded(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 1e-4
    changed = {
        ".".join(name.split(".")[-2:])
        for name, value in base.named_parameters()
        if ".experts." in name and not torch.equal(merged.get_parameter(name), value)
    }
    assert changed == set(parameters)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["mlp.gate.weight"]}, r"target_parameters: \['mlp\.gate\.weight'\] found.*experts"),
        ({"peft_version": "0.18.1"}, "saved by PEFT 0.18.1, which ordered"),
        ({"peft_version": None}, "saved by PEFT of an unknown version"),
        ({"rank_pattern": {"q_proj": 2}}, "beside rank_pattern or alpha_pattern"),
        ({"target_parameters": 3}, "target_parameters: 3 found, expected a list of names"),
    ],
)
def test_foreign_adapters_of_parameters_are_checked(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    """What would be merged wrongly, or is no routed expert's, is refused by its field."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": "0.21.2", "target_parameters": WEIGHTS}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert read_adapter_config(path)["target_parameters"] == WEIGHTS
    path.write_text(json.dumps(config | fields), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_adapter_config(path)
