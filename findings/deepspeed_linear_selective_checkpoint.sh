#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0: ZeRO-3's linear layer under torch's selective checkpointing adds its bias twice, silently.
#
# `zero.Init` puts `LinearFunctionForZeroStage3` in the place of `torch.nn.functional.linear`. It computes
# `output = input.matmul(weight.t())` and then `output += bias`. Selective checkpointing (a policy that keeps `aten.mm`, as
# its documentation shows) keeps the result of the matmul, into which the bias is then written. The recomputation in the
# backward takes the kept result and adds the bias again.
#
# torch refuses kept tensors that are written to later, by their version counter. `matmul` of [batch, tokens, hidden]
# returns an `_unsafe_view`, which shares the memory and not the counter, so nothing is refused.
#
# It surprises whoever fine-tunes a model with biases (Qwen2's queries, keys and values) under ZeRO-3 and keeps matrix
# products: losses are right, gradients are not. `memory_efficient_linear: false` leaves torch's own layer in place.
#
# Seen: the gradient differs by 0 with torch's layer, and by more than a hundredth of itself with DeepSpeed's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet setuptools torch==2.13.0 2>/dev/null
DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8 2>/dev/null

cat >"$folder/gradients.py" <<'PYTHON'
from functools import partial

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

torch.manual_seed(0)
first, second = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16).requires_grad_(False)
keep_products = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def gradient(linear, context_fn=None):
    rows = torch.linspace(-1, 1, 48).reshape(1, 3, 16).requires_grad_()

    def block(rows):
        hidden = nn.functional.silu(linear(rows, first.weight, first.bias))
        return linear(hidden, second.weight, second.bias)

    result = block(rows) if context_fn is None else checkpoint(block, rows, use_reentrant=False, context_fn=context_fn)
    result.square().sum().backward()
    return rows.grad


for name, linear in (("torch", nn.functional.linear), ("deepspeed", zero3_linear_wrap)):
    plain, kept = gradient(linear), gradient(linear, keep_products)
    difference = float((kept - plain).norm() / plain.norm())
    print(f"{name}: the gradient differs by {difference:.3g} of itself")
    assert (difference == 0) if name == "torch" else (difference > 0.01)
PYTHON
DS_ACCELERATOR=cpu "$folder/venv/bin/python" "$folder/gradients.py"
