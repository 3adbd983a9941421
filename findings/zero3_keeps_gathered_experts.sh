#!/usr/bin/env bash
# deepspeed 0.19.8 with transformers 5.23.0 and torch 2.13.0: under ZeRO-3 the frozen experts of every decoder layer stay
# gathered from the forward to the backward, while the frozen linear layers beside them are given back.
#
# ZeRO-3 frees a layer's parameters after its forward by taking the data away from the Parameter objects. For linear layers
# it replaces torch.nn.functional.linear by a function that saves the Parameter itself. A mixture's routed experts are no
# linear layers: transformers keeps them in one three-dimensional Parameter, and computes them with torch's grouped_mm, whose
# backward saves what it was given, a transposed view of the gathered data. The Parameter is empty again, its gathered
# storage lives on in the graph. Nothing warns, and DeepSpeed's own counts of available parameters are back at zero.
#
# So whoever trains adapters of such a model without gradient checkpointing has all experts of all layers on each rank at
# the end of the forward: ZeRO-3 divides them and the step holds them whole.
#
# Seen: Qwen3-MoE of 4 layers, 8 experts each, frozen; only the embedding's output asks for gradients. Experts take
# 12582912 bytes in all. After the forward the graph holds 12582912 bytes of gathered experts and 0 bytes of the other
# gathered weights of the layers, while DeepSpeed has given back every parameter. With gradient checkpointing: 0 and 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet deepspeed==0.19.8 transformers==5.23.0 2>/dev/null

cat >"$folder/experts.py" <<'PYTHON'
import deepspeed
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

deepspeed.init_distributed("gloo", verbose=False)
SIZES = dict(
    vocab_size=256, hidden_size=256, moe_intermediate_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=32,
    num_attention_heads=8, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, attn_implementation="sdpa",
)
BOUNDS = dict(stage=3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0, stage3_max_live_parameters=0)
BOUNDS |= dict(stage3_prefetch_bucket_size=0)


def kept(checkpointed):
    """Bytes of gathered weights, of experts and of all else in the layers, that the graph holds after the forward."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "lm_head.weight"  # something must be trained
    model.enable_input_require_grads()
    if checkpointed:
        model.gradient_checkpointing_enable()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": BOUNDS, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    engine.train()
    layers = [(n, p) for n, p in engine.module.named_parameters() if ".layers." in n]
    sizes = {"experts": 0, "others": 0}
    numbers = {p.ds_numel: "experts" if ".experts." in n else "others" for n, p in layers}
    seen, held = set(), []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kind = numbers.get(storage.nbytes() // 4)
        is_weight = kind is not None and not tensor.requires_grad and not hasattr(tensor, "ds_id")
        if is_weight and storage._cdata not in seen and tensor._base is not None:
            seen.add(storage._cdata)
            sizes[kind] += storage.nbytes()
        held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(input_ids=torch.arange(100)[None], use_cache=False).logits.sum()
    available = sum(p.numel() for _, p in layers)
    whole = 4 * sum(p.ds_numel for n, p in layers if ".experts." in n)
    del loss
    return sizes, available, whole


for checkpointed in (False, True):
    sizes, available, whole = kept(checkpointed)
    print(f"checkpointed {checkpointed}: experts {sizes['experts']} of {whole}, others {sizes['others']}; "
          f"numbers in the Parameters {available}")
    assert available == 0, available
    assert sizes["others"] == 0, sizes
    assert sizes["experts"] == (0 if checkpointed else whole), sizes
PYTHON
export TORCH_EXTENSIONS_DIR="$folder/extensions" DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29733
"$folder/venv/bin/python" "$folder/experts.py" 2>&1 | grep -a "checkpointed\|Error\|assert"
