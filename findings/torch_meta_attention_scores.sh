#!/usr/bin/env bash
# torch 2.13.0: on the meta device scaled_dot_product_attention keeps the [tokens x tokens] scores for the backward; with
# values, and under FakeTensorMode, it does not.
#
# Meta tensors are the usual way to find out what a model's step will hold without the memory to hold it: same shapes,
# same types, same autograd. But which of its kernels sdpa takes is decided by the device, and meta tensors get the plain
# one: product, softmax, product. Autograd then saves the softmax's result, float32 copies of query and key, and masks.
# The same call on the CPU takes the flash kernel, which saves its inputs, its output and one number a row. Nothing warns.
#
# So a forecast of activation memory by meta tensors grows with the square of the sequence, where the run's does not:
# at 1,024 tokens 9 times too much, at 4,096 tokens 33 times. FakeTensorMode dispatches as the device that it pretends,
# and agrees with the run.
#
# Seen: bytes that autograd saved for one causal call with 2 heads of 64, bfloat16, at 1,024 and 4,096 tokens:
# with values 1056768 and 4227072, under FakeTensorMode the same, on the meta device 9961472 and 140509184.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null

cat >"$folder/saved.py" <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HEADS, WIDTH = 2, 64


def saved_bytes(tokens, device):
    """Bytes of the storages that one call of sdpa saves for its backward, each once."""
    kept, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # so that no storage's place is used again
        return tensor

    shape = (1, HEADS, tokens, WIDTH)
    query, key, value = (torch.zeros(shape, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return sum(kept.values())


for tokens in (1024, 4096):
    real, meta = saved_bytes(tokens, "cpu"), saved_bytes(tokens, "meta")
    with FakeTensorMode():
        fake = saved_bytes(tokens, "cpu")
    print(f"{tokens} tokens: with values {real}, FakeTensorMode {fake}, meta {meta}: {meta / real:.1f} times")
    assert fake == real, (fake, real)
    assert meta > 4 * real, (meta, real)
    assert meta >= 2 * HEADS * tokens * tokens, "the scores are not among what is saved"
PYTHON
"$folder/venv/bin/python" "$folder/saved.py"
