#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: each forward reads a value from the device, which fake tensors hide.
#
# Without an attention mask, transformers asks by the positions whether a row is packed: `find_packed_sequence_indices` ends
# in `if not is_tracing(x) and (x[:, -1] == 0).all()`. On a GPU that comparison waits until every kernel before it has ended,
# once in each forward, also for rows that are not packed and where the caller gives no positions (the model makes them).
#
# Under torch's FakeTensorMode, which raises where a value of a tensor is needed, nothing is raised: `is_tracing` is true for
# fake tensors, and the question is left out. So a dry run on fake tensors, made to find such waits, calls this forward clean.
#
# It surprises whoever looks for what keeps the GPU's queue empty. For an attention that has no function in
# `AttentionMaskInterface` no mask is made, and nothing is asked.
#
# Seen: reads of a value in one forward of a Llama of two layers: 1 with sdpa, with and without position_ids; 0 with an
# attention that is registered without a mask function; 0 and no error under FakeTensorMode, where `bool(tensor)` raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 2>/dev/null

cat >"$folder/reads.py" <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

READ = torch.ops.aten._local_scalar_dense.default
AttentionInterface.register("without_mask", sdpa_attention_forward)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is READ
        return func(*args, **(kwargs or {}))


def reads(attention, *, with_positions):
    """Values that the host reads from tensors in one forward of a row that is not packed."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    row = torch.arange(3, 12)[None]
    positions = {"position_ids": torch.arange(9)[None]} if with_positions else {}
    with torch.no_grad(), Reads() as counted:
        model(input_ids=row, use_cache=False, **positions)
    return counted.count


found = {
    "sdpa, position_ids": reads("sdpa", with_positions=True),
    "sdpa, no position_ids": reads("sdpa", with_positions=False),
    "no mask function, position_ids": reads("without_mask", with_positions=True),
}
with FakeTensorMode(allow_non_fake_inputs=True):
    found["sdpa, position_ids, fake tensors"] = reads("sdpa", with_positions=True)
    try:
        bool(torch.ones(1).all())
    except DataDependentOutputException:
        print("fake tensors: bool(tensor) raises")
    else:
        raise AssertionError("fake tensors let a value be read")
for name, count in found.items():
    print(f"{name}: {count} reads")
assert list(found.values()) == [1, 1, 0, 0], found
PYTHON
"$folder/venv/bin/python" "$folder/reads.py"
