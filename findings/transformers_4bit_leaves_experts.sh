#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2: load_in_4bit leaves a mixture's routed experts as they are, and says nothing.
#
# bitsandbytes replaces linear layers. Since transformers holds all experts of a layer in one three-dimensional Parameter,
# they are no linear layers any more, so a mixture that is asked for in 4 bits is loaded with attention in 4 bits and
# nearly all of its weights in 16: of Mixtral 8x7B 45.1 of 46.7 billion. Config and model both say that it is quantised
# (is_loaded_in_4bit, quantization_config), no warning appears, and the only sign is the memory that it takes.
#
# Seen: a tiny Mixtral whose routed experts are 98% of its decoder's weights, loaded in NF4. q_proj is stored as uint8,
# mlp.experts.gate_up_proj and mlp.experts.down_proj as bfloat16: 2% of the decoder's weights are in 4 bits.
# is_loaded_in_4bit: True; warnings that name experts: 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 2>/dev/null

cat >"$folder/experts.py" <<'PYTHON'
import contextlib
import io
import logging
import sys
import tempfile
import warnings

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging as transformers_logging

heard = []


class Ear(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())


transformers_logging.set_verbosity_warning()
transformers_logging.add_handler(Ear())
config = MixtralConfig(
    vocab_size=256, hidden_size=128, intermediate_size=448, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=2, eos_token_id=2,
)
with tempfile.TemporaryDirectory() as folder:
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()) as errors:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
said = [*heard, *(str(one.message) for one in caught), errors.getvalue()]
named = sum("expert" in line.lower() for line in said)
in_4_bits = whole = 0
for name, parameter in model.model.layers.named_parameters():
    numbers = 2 * parameter.numel() if parameter.dtype == torch.uint8 else parameter.numel()
    whole += numbers
    in_4_bits += numbers if parameter.dtype == torch.uint8 else 0
    if name.startswith("0.") and ("q_proj" in name or "experts" in name):
        print(name, parameter.dtype)
share = in_4_bits / whole
print(f"in 4 bits: {share:.0%} of the layers' weights; is_loaded_in_4bit: {model.is_loaded_in_4bit}; "
      f"warnings that name experts: {named}")
layer = dict(model.model.layers[0].named_parameters())
assert layer["self_attn.q_proj.weight"].dtype == torch.uint8
assert layer["mlp.experts.gate_up_proj"].dtype == layer["mlp.experts.down_proj"].dtype == torch.bfloat16
assert share < 0.03, share
assert model.is_loaded_in_4bit and model.config.quantization_config is not None
assert named == 0, [line for line in said if "expert" in line.lower()]
PYTHON
"$folder/venv/bin/python" "$folder/experts.py"
