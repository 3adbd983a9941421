#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0: routed experts with adapters cannot be forwarded on the meta device, where they can without.
# The message is "unsupported scalarType".
#
# Meta tensors are how a tool finds out what a step will hold before there is memory for it. Adapters of experts
# (target_parameters) are added to the weights inside a block that asks for no autocast, for the device of the weight:
# torch.autocast(device_type="meta", enabled=False). torch knows no type for autocast on meta and raises before it looks at
# `enabled`. transformers meets the same question in every rotary embedding, and answers it by not asking for meta.
#
# Seen: the MLP block of a tiny Qwen3-MoE on meta, adapters on q_proj alone: an output of [1, 7, 32]; on the experts too:
# RuntimeError: unsupported scalarType. On the CPU both give [1, 7, 32].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 2>/dev/null

cat >"$folder/meta.py" <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

warnings.simplefilter("ignore")
SIZES = dict(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=16,
    num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, attn_implementation="eager",
    experts_implementation="batched_mm",
)


def output(device, parameters):
    with torch.device(device):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters))
        return list(policy.get_base_model().model.layers[0].mlp(torch.zeros(1, 7, 32)).shape)


experts = ["experts.gate_up_proj", "experts.down_proj"]
print("cpu:", output("cpu", None), output("cpu", experts))
print("meta, attention alone:", output("meta", None))
assert output("cpu", None) == output("cpu", experts) == output("meta", None) == [1, 7, 32]
try:
    found = output("meta", experts)
except RuntimeError as error:
    print("meta, experts too: RuntimeError:", error)
    assert "unsupported scalarType" in str(error), error
else:
    raise SystemExit(f"meta, experts too: {found}: it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/meta.py"
