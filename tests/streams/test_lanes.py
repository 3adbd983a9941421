"""Both streams in one visit of the weights, against two separate forwards over the same weights."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import VOCAB_SIZE
from torch import Tensor, nn
from toy import UFT, both, logps_by_name, toy_model_again, toy_sequences
from transformers import AutoConfig, CohereConfig

from uft_ds.architectures.facts import final_norm
from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import UserError
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams import offload as activation_offload
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.lanes import Lanes
from uft_ds.streams.load import empty_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.packed_attention import attention_of_transformers
from uft_ds.streams.stream import BARE_BASE, POLICY

BATCH = micro_batch(toy_sequences(4))


def step(model: UFTModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs of both streams, and the adapters' gradients of the UFT loss."""
    model.zero_grad()
    logps = logps_by_name(model, BATCH)
    loss, _ = micro_batch_loss(UFT, BATCH, count_terms(UFT, BATCH.responses), logps)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps["policy"].detach(), logps["reference"], grads


def first_projection(layer: nn.Module) -> nn.Module:
    """Queries alone, or what stands for queries, keys and values."""
    return next(module for module in layer.modules() if isinstance(module, LoraLayer))


@contextmanager
def watching(modules: dict[str, nn.Module], on_call: Callable[[str, nn.Module], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda m, _, name=name: on_call(name, m)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- the same numbers


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_lockstep_equals_two_separate_forwards(family_folder: Path, gradient_checkpointing: bool) -> None:
    """Invariant 6: bit for bit the same log-probs of both streams and the same gradients, every architecture."""
    options = {"gradient_checkpointing": gradient_checkpointing}
    ours = step(toy_model_again(family_folder, reference_mode="lockstep", **options))
    theirs = step(toy_model_again(family_folder, reference_mode="separate", **options))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] - ours[1]).abs().mean() > 0.1, "adapters that change nothing prove nothing"
    assert set(ours[2]) == set(theirs[2])
    assert all(torch.equal(ours[2][name], grad) for name, grad in theirs[2].items())


def test_each_stream_alone_equals_its_part_of_both(tiny_qwen2: Path) -> None:
    """Cached reference (policy alone) and cache filling (reference alone) change no bit of what is computed."""
    model = toy_model_again(tiny_qwen2)
    policy_R, reference_R = (value.detach() for value in both(model, BATCH))
    alone = logps_by_name(model, BATCH, "policy")
    assert list(alone) == ["policy"]
    assert torch.equal(alone["policy"], policy_R)
    alone = logps_by_name(model, BATCH, "reference")
    assert list(alone) == ["reference"]
    assert torch.equal(alone["reference"], reference_R)
    assert not alone["reference"].requires_grad


def test_evaluation_gives_the_same_log_probs(tiny_qwen2: Path) -> None:
    """Without gradients, in evaluation mode, nothing is stored for a backward and no bit changes."""
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=True)
    trained = [value.detach() for value in both(model, BATCH)]
    model.eval()
    with torch.no_grad():
        evaluated = both(model, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


# ---- one visit


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_every_base_weight_is_visited_once(family_folder: Path, gradient_checkpointing: bool) -> None:
    """Embedding, layers, final norm and head are each called once for both streams, in the policy's order.

    Inside a layer each projection runs twice (once a stream), and in the backward of a checkpointed layer once: the
    reference is not recomputed.
    """
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing)
    base: Any = model.policy.get_base_model()
    decoder = base.get_decoder()
    visited = {"embedding": base.get_input_embeddings(), "norm": final_norm(decoder)}
    visited |= {"head": base.get_output_embeddings()}
    visited |= {f"layer {i}": layer for i, layer in enumerate(decoder.layers)}
    projections = {f"projection {i}": first_projection(layer) for i, layer in enumerate(decoder.layers)}
    calls: list[str] = []
    with watching(visited | projections, lambda name, _: calls.append(name)):
        logps_R, _ = both(model, BATCH)
        forward = [name for name in calls if "projection" not in name]
        assert forward == ["embedding", *(f"layer {i}" for i in range(len(decoder.layers))), "norm", "head"]
        assert all(Counter(calls)[name] == 2 for name in projections)
        calls.clear()
        logps_R.sum().backward()
    assert Counter(calls) == (Counter(list(projections)) if gradient_checkpointing else Counter())


# ---- nothing of the reference is kept for the backward


def saved_bytes(model: UFTModel, *names: str) -> int:
    """Bytes of activations that autograd holds between forward and backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = logps_by_name(model, BATCH, *names)
    logps["policy"].sum().backward()
    return sum(sizes.values())


def live_hidden_states(model: UFTModel, *names: str) -> int:
    """Hidden states, alone or stacked, in Python-visible tensors between forward and backward: what a closure keeps."""
    size = BATCH.token_ids_T.numel() * 64
    gc.freeze()  # what there is already: it is much, and other tests' objects may raise on a look
    try:
        logps = logps_by_name(model, BATCH, *names)
        gc.collect()
        live = sum(o.numel() // size for o in gc.get_objects() if type(o) is Tensor and o.numel() % size == 0)
    finally:
        gc.unfreeze()
    logps["policy"].sum().backward()
    return live


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_no_reference_state_is_kept_for_the_backward(family_folder: Path, gradient_checkpointing: bool) -> None:
    """Lockstep saves as many bytes of activations as the policy alone (SFT), and no tensor outlives its layer."""
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing)
    assert saved_bytes(model, "policy", "reference") == saved_bytes(model, "policy") > 0
    assert live_hidden_states(model, "policy", "reference") == live_hidden_states(model, "policy")


def test_activation_offload_keeps_numbers_and_leaves_weights(tiny_qwen2: Path, monkeypatch: Any) -> None:
    """Every layer's input goes to host memory, no weight does, and log-probs and gradients keep every bit."""
    plain = step(toy_model_again(tiny_qwen2, gradient_checkpointing=True))
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=True, activation_offload=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    offloaded: list[Tensor] = []
    to_host = activation_offload._to_host

    def recorded(tensor: Tensor) -> Any:
        packed = to_host(tensor)
        if not isinstance(packed, Tensor):
            offloaded.append(tensor)
            assert packed[1].data_ptr() != tensor.data_ptr()
        return packed

    monkeypatch.setattr(activation_offload, "_to_host", recorded)
    ours = step(model)
    hidden = [tensor for tensor in offloaded if tensor.shape == (1, BATCH.token_ids_T.numel(), 64)]
    assert len({tensor.data_ptr() for tensor in hidden}) >= 3
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in offloaded)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    assert all(torch.equal(ours[2][name], grad) for name, grad in plain[2].items())


# ---- nothing leaks


def test_no_adapter_state_leaks_and_no_flag_flips(tiny_qwen2: Path) -> None:
    """An exception inside the reference's part of a layer leaves adapters on; `requires_grad` is the same all along."""
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=True)
    layer: Any = model.policy.get_base_model().get_decoder().layers[1]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    disabled: list[bool] = []
    expected = step(model)

    def look(_: str, module: Any) -> None:
        disabled.append(module.disable_adapters)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        if len(disabled) == 1:
            raise KeyError

    with watching({"down": layer.mlp.down_proj}, look):
        with pytest.raises(KeyError):
            both(model, BATCH)
        assert not layer.mlp.down_proj.disable_adapters
        again = step(model)
    assert disabled == [True, True, False, False], "reference (raises), reference, policy, policy recomputed"
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])


def test_names_are_those_of_the_plain_model(tiny_qwen2: Path) -> None:
    """Swapped classes rename nothing, survive a deepcopy, and still generate."""
    lockstep, separate = toy_model_again(tiny_qwen2), toy_model_again(tiny_qwen2, reference_mode="separate")
    assert list(lockstep.state_dict()) == list(separate.state_dict())
    assert list(get_peft_model_state_dict(lockstep.policy)) == list(get_peft_model_state_dict(separate.policy))
    twin = copy.deepcopy(lockstep)
    with torch.no_grad():
        for parameter in lockstep.parameters():
            parameter.zero_()
    assert torch.equal(both(twin, BATCH)[0], both(separate, BATCH)[0]), "the copy must not run the original's weights"
    prompt = {"input_ids": torch.arange(3, 20)[None], "max_new_tokens": 5, "do_sample": False}
    tokens = []
    for model in (twin, separate):
        with attention_of_transformers(model.policy.get_base_model()):
            tokens.append(model.policy.eval().generate(**prompt).tolist())
    assert tokens[0] == tokens[1]


def test_a_cache_is_not_made_by_mistake(tiny_qwen2: Path) -> None:
    """Packed sequences stay apart only without a key-value cache: no forward of ours may ask for one."""
    model = toy_model_again(tiny_qwen2)
    seen: list[Any] = []
    decoder: Any = model.policy.get_base_model().get_decoder()
    decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["past_key_values"], kwargs["use_cache"])), with_kwargs=True
    )
    for names in (("policy", "reference"), ("policy",), ("reference",)):
        logps_by_name(model, BATCH, *names)
    assert seen == [(None, False)] * 3


# ---- refused


def test_layers_not_shown_to_work_are_refused() -> None:
    """A family that no test of ours has held against its own forward: named, with the way out."""
    config = CohereConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.5,
    )  # fmt: skip
    policy = add_adapters(empty_base(config), rank=4, alpha=8.0, targets="all-linear", dtype=torch.float32, seed=0)
    with pytest.raises(UserError, match=r"reference.mode: .*CohereForCausalLM.*CohereDecoderLayer.*separate"):
        UFTModel(policy, reference_mode="lockstep")


def test_a_lane_carries_only_the_newest_state(tiny_qwen2: Path) -> None:
    """After the forward the lane holds the last layer's output, [1, tokens, hidden], without gradient."""
    model = toy_model_again(tiny_qwen2)
    lanes = Lanes((POLICY, BARE_BASE))
    config = AutoConfig.from_pretrained(tiny_qwen2)
    model._decode(model.policy.get_base_model(), BATCH, lanes=lanes)
    assert list(lanes.hidden) == ["reference"]
    assert lanes.hidden["reference"].shape == (1, BATCH.token_ids_T.numel(), config.hidden_size)
    assert not lanes.hidden["reference"].requires_grad
