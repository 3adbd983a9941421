"""Routed experts by grouped products: transformers' values, and no gathered weight kept for the backward."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, TARGETS
from models import PACKED, sequences, tiny_policy
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from uft_ds.data.micro_batch import micro_batch
from uft_ds.streams.grouped import LEAN_EXPERTS, enable_lean_experts, experts_of_transformers

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def experts_of(family: str, dtype: torch.dtype) -> Any:
    """The experts of a tiny model's first layer, and what enables them."""
    model = tiny_policy(PACKED[family], dtype=dtype, targets=TARGETS).get_base_model()
    enable_lean_experts(model.get_decoder())
    (experts, *_) = (module for module in model.modules() if hasattr(module, "_is_expert_parallel"))
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_have_the_values_of_transformers(family: str, trained: bool, dtype: torch.dtype) -> None:
    """Outputs and all gradients, to the bit, also where an expert has no token."""
    experts = experts_of(family, dtype)
    experts.requires_grad_(trained)
    generator = torch.Generator().manual_seed(0)
    chosen_Tk = torch.randint(0, 3, (11, 2), generator=generator)  # of four experts
    given_TD = torch.randn(11, 64, generator=generator).to(dtype)
    weights_Tk, factor_TD = torch.rand(11, 2, generator=generator).to(dtype), torch.randn(11, 64, generator=generator)
    found = []
    for name in (LEAN_EXPERTS, "grouped_mm"):
        hidden_TD, share_Tk = given_TD.clone().requires_grad_(), weights_Tk.clone().requires_grad_()
        output_TD = ALL_EXPERTS_FUNCTIONS[name](experts, hidden_TD, chosen_Tk, share_Tk)
        experts.zero_grad()
        (output_TD.float() * factor_TD).sum().backward()
        of_weights = [parameter.grad for parameter in experts.parameters()]
        found.append([output_TD.detach(), hidden_TD.grad, share_Tk.grad, *of_weights])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert (found[0][3] is not None) == trained


@pytest.mark.parametrize("family", MIXTURES)
def test_no_view_of_a_frozen_weight_is_kept(family: str) -> None:
    """ZeRO-3 takes a parameter's data away after its layer; a view would keep it for every layer."""
    policy = tiny_policy(PACKED[family], targets=TARGETS, attention="sdpa")
    model = policy.get_base_model()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    batch = micro_batch(sequences(7, 12))

    def views() -> int:
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() in weights:
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.get_decoder()(input_ids=batch.token_ids_T[None], position_ids=batch.position_ids_T[None])
        return sum(tensor.dim() == 3 for tensor in kept)

    model.enable_input_require_grads()
    assert views() == 4  # transformers: two weights in each of two layers
    enable_lean_experts(model.get_decoder())
    assert views() == 0


def test_experts_of_another_form_are_left_to_transformers() -> None:
    """GPT-OSS has biases and transposed weights; a dense model has no experts."""
    moe = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    for model in (moe, dense):
        before = model.config._experts_implementation
        enable_lean_experts(model.get_decoder())
        assert model.config._experts_implementation == before != LEAN_EXPERTS


def test_the_models_own_forward_is_transformers() -> None:
    """What the check before the first step compares with; afterwards the model computes as before."""
    model = tiny_policy(deepcopy(PACKED["olmoe"]), targets=TARGETS).get_base_model()
    enable_lean_experts(model.get_decoder())
    assert model.config._experts_implementation == LEAN_EXPERTS
    with experts_of_transformers(model):
        assert model.config._experts_implementation == "grouped_mm"
    assert model.config._experts_implementation == LEAN_EXPERTS
