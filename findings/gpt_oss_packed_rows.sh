#!/usr/bin/env bash
# transformers 5.23.0: the same packed row keeps its sequences apart in Mixtral and Qwen3-MoE, and mixes them in gpt-oss.
#
# Without an attention mask, `position_ids` that restart at 0 mark where a packed sequence begins: transformers then builds
# a block-diagonal mask. gpt-oss uses the positions for its rotary embedding and builds its masks without them, so the
# second sequence of a row attends to the first. No error and no warning: one sequence alone is right, and so is the first
# one of each row, which is why a comparison with single rows does not find it.
#
# It surprises whoever packs training rows (padding-free collators do) and changes the base model: losses stay plausible,
# and gradients depend on which sequences share a row. uft_ds compares packed rows with single ones before the first step.
#
# Seen (float32, eager attention, random weights of two layers), largest difference of any log-prob of the second sequence
# of a row from the same sequence alone, in nats: Llama 5e-7, Mixtral 5e-7, Qwen3-MoE 5e-7, gpt-oss 0.15. The upstream
# change that would pass the positions on (transformers pull request 39997) was still open then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 2>/dev/null

cat >"$folder/packed.py" <<'PYTHON'
import torch
import transformers

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"intermediate_size": 64, "num_experts_per_tok": 2}
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SIZES, intermediate_size=64),
    "Mixtral": transformers.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=32, num_experts=4, head_dim=8),
    "gpt-oss": transformers.GptOssConfig(**SIZES, **EXPERTS, num_local_experts=4, head_dim=8),
}
torch.manual_seed(0)
first, second = torch.randint(3, 64, (1, 9)), torch.randint(3, 64, (1, 7))
row = torch.cat([first, second], dim=1)
positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
found = {}
for name, config in CONFIGS.items():
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        packed = model(input_ids=row, position_ids=positions, use_cache=False).logits[0, 9:].log_softmax(-1)
        alone = model(input_ids=second, use_cache=False).logits[0].log_softmax(-1)
    found[name] = float((packed - alone).abs().max())
    print(f"{name:10} {found[name]:.1e} nats")
apart = all(found[name] < 1e-5 for name in ("Llama", "Mixtral", "Qwen3-MoE"))
raise SystemExit(0 if apart and found["gpt-oss"] > 0.01 else "this has changed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/packed.py"
