#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Bamba's forward with a cache counts positions from 0 again unless it is told them.
#
# Where the caller gives no `position_ids`, `BambaModel.forward` makes them as `torch.arange(new tokens)` and does not add
# the length of the cache. The attention layers then rotate a token that follows twelve others as if it were the first.
# Nothing is raised. Ten other hybrid and plain families (Granite, LFM2, Llama and so on) add `get_seq_length()`.
#
# `generate` is not affected: it gives `position_ids` itself. Whoever writes a decoding loop, scores a continuation on a
# cached prompt, or compares cached with uncached numbers, gets other logits: of the size of the logits themselves here.
#
# Seen: greatest difference between logits with a cache and without, over twelve tokens that follow twelve cached ones:
# Bamba 2.4 without position_ids and 6e-6 with them; GraniteMoeHybrid and LFM2 below 1e-4 either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 2>/dev/null

cat >"$folder/cached.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, BambaConfig, GraniteMoeHybridConfig, Lfm2Config

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
CONFIGS = {
    "bamba": BambaConfig(**SIZES, **STATE, attn_layer_indices=[1]),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SIZES, **STATE, layer_types=["mamba", "attention"], position_embedding_type="rope",
        num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=64,
    ),
    "lfm2": Lfm2Config(**SIZES, full_attn_idxs=[1]),
}
CACHED, LENGTH = 12, 24


@torch.no_grad()
def difference(model, ids, *, with_positions):
    """The greatest difference of a logit, decoding one token after the other against one forward without a cache."""
    whole = model(ids, use_cache=False).logits[0]
    out = model(ids[:, :CACHED], use_cache=True)
    greatest = 0.0
    for place in range(CACHED, LENGTH):
        positions = {"position_ids": torch.tensor([[place]])} if with_positions else {}
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True, **positions)
        greatest = max(greatest, float((out.logits[0, -1] - whole[place]).abs().max()))
    return greatest


found = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 128, (1, LENGTH))
    found[name] = [difference(model, ids, with_positions=given) for given in (False, True)]
    print(f"{name}: without position_ids {found[name][0]:.1e}, with {found[name][1]:.1e}")
assert found["bamba"][0] > 0.1 and found["bamba"][1] < 1e-4, found
assert all(value < 1e-4 for name in ("granitemoehybrid", "lfm2") for value in found[name]), found
PYTHON
"$folder/venv/bin/python" "$folder/cached.py"
