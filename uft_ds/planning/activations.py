"""Activation memory of a micro-batch, saved and at its peak, measured with tensors that need no memory.

The real model runs forward and backward on the meta device: every operation is dispatched with real shapes and
lifetimes, but without values. It runs once with two layers and once with one; all others are like the second. torch's
`FakeTensorMode` would do the same, and take five times as long (2.13).

T packed tokens, D hidden size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import moe
from transformers.masking_utils import flash_attention_mask
from transformers.utils import import_utils

from uft_ds.architectures.facts import keep_layers
from uft_ds.planning.structure import ITEM_BYTES, Structure
from uft_ds.streams import grouped
from uft_ds.streams.grouped import enable_lean_experts
from uft_ds.streams.lanes import Lanes, enable_lockstep
from uft_ds.streams.linear import enable_lean_linear
from uft_ds.streams.packed_attention import PACKED, bounds_for_attention
from uft_ds.streams.policy import base_of
from uft_ds.streams.recompute import Recompute, enable_recompute
from uft_ds.streams.stream import BARE_BASE, POLICY

FLASH = "uft_planned_flash"
"""Name under which the substitute for flash-attention is registered in transformers."""


@dataclass(frozen=True)
class Activations:
    """Activation memory of one micro-batch in bytes, without weights."""

    saved_bytes: int
    """Saved between forward and backward of the decoder: all layers and the final norm."""
    layer_bytes: int
    """Peak in addition to that: one layer's inner tensors and gradients, while it is computed or recomputed."""
    stream_bytes: int
    """The reference's hidden state before and after the final norm, which is held when the head is reached."""

    def divided(self, ranks: int) -> Activations:
        """Those of each of several ranks that share the row: every tensor has a part of the tokens, or of the heads."""
        return Activations(*(-(-size // ranks) for size in (self.saved_bytes, self.layer_bytes, self.stream_bytes)))


def activations_of(
    structure: Structure,
    *,
    lengths: tuple[int, ...],
    dtype: str,
    gradient_checkpointing: Recompute,
    lockstep: bool,
    attention: str,
    under_zero3: bool,
) -> Activations:
    """Activation memory of a micro-batch of packed sequences.

    Args:
        lengths: of the sequences, in tokens.
        under_zero3: use DeepSpeed's own linear function where a model calls torch's directly: it saves its input even
            if the weight is frozen. Plain linear layers are `LeanLinear` in any case.
        lockstep: the reference is computed together with the policy, layer by layer.
        attention: `packed`, `flash_attention_2`, `sdpa` or `eager`; the last two need a mask of T x T for packed rows.
    """
    options: dict[str, Any] = {
        "lengths": lengths,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
        "lockstep": lockstep,
        "attention": _stand_in(attention, dtype, structure.config),
        "under_zero3": under_zero3,
    }
    two, one = (_run(structure, layers=layers, **options) for layers in (2, 1))
    saved = one.saved_bytes + (structure.num_layers - 1) * (two.saved_bytes - one.saved_bytes)
    hidden_1TD = sum(lengths) * structure.config.hidden_size * ITEM_BYTES[dtype]
    return Activations(saved, max(0, two.peak_bytes - two.saved_bytes), 2 * hidden_1TD if lockstep else 0)


def _stand_in(attention: str, dtype: str, config: Any) -> str:
    """The attention that saves on the meta device what this one saves on a GPU; others than kernels run as they are."""
    is_kernel = dtype != "float32" and not getattr(config, "attn_logit_softcapping", None)
    return FLASH if attention == "flash_attention_2" or (attention == PACKED and is_kernel) else attention


@dataclass(frozen=True)
class _Measured:
    saved_bytes: int
    peak_bytes: int


def _run(
    structure: Structure,
    *,
    layers: int,
    lengths: tuple[int, ...],
    dtype: str,
    gradient_checkpointing: Recompute,
    lockstep: bool,
    attention: str,
    under_zero3: bool,
) -> _Measured:
    policy = copy.deepcopy(structure.sample)
    base = base_of(policy)
    decoder = base.get_decoder()
    keep_layers(decoder, layers)
    _keep_frequencies(decoder)
    decoder.config._attn_implementation = attention
    enable_recompute(base, gradient_checkpointing)
    enable_lean_linear(base.get_decoder())
    enable_lean_experts(base.get_decoder())
    if lockstep:
        enable_lockstep(base)
    base.enable_input_require_grads()
    # As in a run: with the selective mode torch's own function stays in place.
    linear = _linear_of_zero3() if under_zero3 and gradient_checkpointing != "selective" else nullcontext()
    with (
        linear,
        _experts_in_any_type(),
        _sdpa_is_an_operator(),
        _without_autocast(),
        _unasked(),
        _OnMeta(),
        _Live() as live,
    ):
        weights = _without_memory(policy, getattr(torch, dtype))
        token_ids_1T = torch.zeros(1, sum(lengths), dtype=torch.int64)
        positions_1T = torch.arange(sum(lengths))[None]
        ends_S = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds = bounds_for_attention(ends_S, lengths) if attention == PACKED else {}
        before = live.now
        lanes = {"lanes": Lanes((POLICY, BARE_BASE))} if lockstep else {}
        with _saved(weights) as saved:
            hidden: Any = decoder(
                input_ids=token_ids_1T, position_ids=positions_1T, use_cache=False, **bounds, **lanes
            ).last_hidden_state
        saved_bytes = sum(saved.sizes.values())
        lanes.clear()
        saved.held.clear()
        policy_1TD: Tensor = hidden[0] if lockstep else hidden
        del hidden  # the reference is freed before the backward
        if gradient_checkpointing == "selective":
            # torch keeps the results itself, where no hook of autograd sees them.
            saved_bytes = live.now - before - policy_1TD.nbytes
        if layers > 1:  # one layer runs for what it saves alone
            policy_1TD.backward(torch.empty_like(policy_1TD))
        # `memory.py` counts the adapters' gradients.
        gradients = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
        peak = live.peak - before
    return _Measured(saved_bytes, max(saved_bytes, peak - gradients))


def _keep_frequencies(decoder: nn.Module) -> None:
    """Let rotary embeddings use the frequencies that they have, as they do for all lengths that training accepts.

    The dynamic kinds compare the largest position with a limit, and here a position has no value.
    """
    for module in decoder.modules():
        kind: Any = getattr(module, "rope_type", None)
        if kind is not None:
            rotary: Any = module
            rotary.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"


def _without_memory(policy: nn.Module, dtype: torch.dtype) -> set[int]:
    """Give a model's tensors a storage each, in the type that they have in a run; returns the storages."""
    made: dict[int, Any] = {}

    def empty(tensor: Tensor, kind: torch.dtype) -> Any:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=kind)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for place, module in policy.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Adapters compute in their own dtype, which the structure's sample already has.
                module._parameters[name] = empty(parameter, parameter.dtype if "lora_" in place else dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer, buffer.dtype)
    return {tensor.untyped_storage()._cdata for tensor in made.values()}


class _OnMeta(TorchDispatchMode):
    """Makes all tensors on the meta device, whichever they are asked for: they have shapes and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # what `torch.tensor` made of numbers
            return args[0].to("meta")
        given = kwargs or {}
        return func(*args, **(given | {"device": "meta"} if _takes_device(func) else given))


@cache
def _takes_device(operator: Any) -> bool:
    return any(argument.name == "device" for argument in operator._schema.arguments)


@contextmanager
def _unasked() -> Iterator[None]:
    """Within the block transformers asks no tensor for a value."""
    original = import_utils.is_fake_tensor
    utils: Any = import_utils
    utils.is_fake_tensor = lambda tensor: True
    try:
        yield
    finally:
        utils.is_fake_tensor = original


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Within the block a request for no autocast is granted for the meta device too, where torch knows none (2.13).

    PEFT (0.21) makes it where it adds adapters to the weights of experts.
    """
    original: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else original(device_type, *args, **options)

    namespace: Any = torch
    namespace.autocast = autocast
    try:
        yield
    finally:
        namespace.autocast = original


@contextmanager
def _sdpa_is_an_operator() -> Iterator[None]:
    """Within the block attention by sdpa is one operator, as it is wherever tensors have values.

    For tensors without, torch takes its plain sums, which save the scores (2.13).
    """
    functional: Any = nn.functional
    original = functional.scaled_dot_product_attention
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        parts = (query, key, value)
        if len({part.shape[-1] for part in parts}) > 1 or any(part.stride(-1) != 1 for part in parts):
            plain: Tensor = original(*parts, attn_mask, dropout_p, is_causal, **options)  # torch has no operator for it
            return plain
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            seen, hidden = (torch.scalar_tensor(number, dtype=query.dtype) for number in (0.0, -torch.inf))
            attn_mask = torch.where(attn_mask, seen, hidden)
        output: Tensor = operator(*parts, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
        return output

    functional.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages, each once even if it has several views."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@dataclass
class _Saved:
    sizes: dict[int, int] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    """Keeps the storages alive: they are identified by address, which must not be reused meanwhile."""


@contextmanager
def _saved(weights: set[int]) -> Iterator[_Saved]:
    """Record what autograd saves within the block, by storage; views of weights are not activations."""
    saved = _Saved()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved.sizes[storage._cdata] = storage.nbytes()
            saved.held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class _Linear(Function):
    """Saves the same tensors as DeepSpeed's `LinearFunctionForZeroStage3`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        output = rows.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight, _ = ctx.saved_tensors
        (gradient,) = gradients
        of_weight = gradient.flatten(0, -2).t().matmul(rows.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return gradient.matmul(weight), of_weight, None


@contextmanager
def _linear_of_zero3() -> Iterator[None]:
    original = nn.functional.linear
    nn.functional.linear = _Linear.apply
    try:
        yield
    finally:
        nn.functional.linear = original


class _GroupedMM(Function):
    """Saves the same tensors as torch's `grouped_mm` with frozen weights: these, and where each expert's rows end.

    torch computes float32 by it, but without values it accepts bfloat16 alone (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(weights, ends)
        return rows.new_empty(rows.shape[0], weights.shape[-1], dtype=weights.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weights, _ = ctx.saved_tensors
        return gradients[0].new_empty(gradients[0].shape[0], weights.shape[-2]), None, None


@contextmanager
def _experts_in_any_type() -> Iterator[None]:
    original = moe._grouped_mm
    integration: Any = moe
    integration._grouped_mm = lambda rows, weights, offs: _GroupedMM.apply(rows, weights, offs)
    own: Any = grouped
    own_original, own.grouped_product = own.grouped_product, _grouped_product
    try:
        yield
    finally:
        integration._grouped_mm, own.grouped_product = original, own_original


def _grouped_product(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """The shape of `grouped.grouped_product`: rows by each expert's weight, or the weights' gradients."""
    experts = (len(ends_E),) if right.dim() == 2 else ()
    return left.new_empty(*experts, left.shape[0], right.shape[-1])


@torch.library.custom_op("uft_ds::planned_flash", mutates_args=())
def _planned_flash(query: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and one float32 per head and token: an operator, so that it can be kept instead of recomputed."""
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@_planned_flash.register_fake
def _(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


class _Flash(Function):
    """Saves the same tensors as flash-attention: queries, keys, values, output, and one float32 per head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = _planned_flash(query)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention with transformers' interface: [1, heads, T, head size] to [1, T, heads, head size]."""
    output: Tensor = _Flash.apply(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return output, None


AttentionInterface.register(FLASH, _flash)
AttentionMaskInterface.register(FLASH, flash_attention_mask)
