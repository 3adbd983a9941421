#!/usr/bin/env bash
# transformers 5.23.0: a model's folder that also holds an adapter_config.json is loaded with that adapter, silently.
#
# `AutoModelForCausalLM.from_pretrained(folder)` reads the whole model from the folder's weights and adds the adapter that
# lies beside them. Trainers that save an adapter and its merged model into one folder make such folders.
#
# It surprises whoever trains or measures "the base": it is base + adapter, applied twice if the weights are merged
# already. Tools that read the weight files, such as merges, see another model. uft_ds refuses such a folder.
#
# Seen: LlamaForCausalLM with the parameters q_proj.lora_A.default.weight and q_proj.lora_B.default.weight.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 2>/dev/null

cat >"$folder/load.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder)
loaded = AutoModelForCausalLM.from_pretrained(folder)
print(type(loaded).__name__, [name for name, _ in loaded.named_parameters() if "lora_" in name])
PYTHON
"$folder/venv/bin/python" "$folder/load.py" "$folder/model"
