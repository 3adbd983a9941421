"""The parameters of a model and the order in which its modules run, from the model built on the meta device.

There is no formula per architecture: transformers and PEFT build the real model without allocating memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from uft_ds.architectures.facts import active_share, decoder_layers, is_passed_by_text, keep_layers
from uft_ds.planning.gathers import Visit
from uft_ds.streams.accept import accepted_policy, check_base_model, whole_policy
from uft_ds.streams.load import empty_base
from uft_ds.streams.nf4 import BLOCK, check_can_be_nf4, constants_bytes, linear_layers
from uft_ds.streams.stream import POLICY_ADAPTER, REFERENCE_ADAPTER

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes per element of the dtypes that a recipe accepts."""

_KEPT = 2
"""Layers of a uniform model to which adapters are really added: for 64 layers PEFT takes ten seconds."""


@dataclass(frozen=True)
class Lora:
    """The form of the adapters."""

    rank: int
    alpha: float
    targets: Literal["all-linear"] | list[str]
    dtype: str
    has_reference: bool = False
    """Whether there is also a frozen reference adapter of the same form."""
    has_reward_head: bool = False
    """Whether a reward model's head is trained with them; no logits are computed then."""
    experts: bool = False
    """Whether a mixture's routed experts get adapters too."""
    trains_all: bool = False
    """Whether there are none, and all parameters of the base are trained, in its own dtype."""
    copies_base: bool = False
    """Whether a frozen copy of the base is the reference beside a base that is trained."""

    @classmethod
    def none(cls, dtype: str, *, copies_base: bool = False) -> Lora:
        """No adapters: all parameters of a base of this dtype are trained."""
        return cls(0, 0.0, [], dtype, trains_all=True, copies_base=copies_base)


@dataclass(frozen=True)
class Structure:
    """Sizes of a model with adapters; a parameter is identified by its index in these tuples.

    A reference's copy of the base is not in them. Of `gathered_sizes` it is the second half.
    """

    sizes: tuple[int, ...]
    is_trainable: tuple[bool, ...]
    is_adapter: tuple[bool, ...]
    active_share: tuple[float, ...]
    """Of each parameter, the share that one token passes: below 1 for a mixture's routed experts, 0 for what reads
    images."""
    layers: tuple[tuple[int, ...], ...]
    """Parameters of each decoder layer, adapters included."""
    embedding: tuple[int, ...]
    norm: tuple[int, ...]
    head: tuple[int, ...]
    """The embedding's parameters if they are tied."""
    reward_head: tuple[int, ...]
    """The one parameter of a reward model's head, of the adapters' type; else empty."""
    config: Any
    lora: Lora
    sample: Any
    """The policy on the meta device, cut to a few layers if all are alike."""
    is_in_nf4: tuple[bool, ...] = ()
    """Of each parameter, whether it is in 4 bits; empty if the base is not quantised."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_base(self) -> int:
        """Number of parameters of the base."""
        return sum(size for size, adapts in zip(self.sizes, self.is_adapter, strict=True) if not adapts)

    @property
    def num_lora(self) -> int:
        """Number of trained parameters."""
        return sum(size for size, trains in zip(self.sizes, self.is_trainable, strict=True) if trains)

    def num_of(self, parameters: Sequence[int]) -> int:
        """Number of elements of the given parameters, without adapters."""
        return sum(self.sizes[p] for p in parameters if not self.is_adapter[p])

    def active_of(self, parameters: Sequence[int]) -> int:
        """Number of elements of the given parameters that one token passes, without adapters."""
        return round(sum(self.sizes[p] * self.active_share[p] for p in parameters if not self.is_adapter[p]))

    @property
    def num_read(self) -> int:
        """Number of parameters of the base that a pass of many tokens reads."""
        return sum(size for size, share in zip(self.sizes, self.active_share, strict=True) if share) - (
            sum(self.sizes) - self.num_base
        )

    @property
    def num_active(self) -> int:
        """Number of parameters of the base that one token passes; less than `num_base` in a mixture of experts."""
        return self.active_of(range(len(self.sizes)))

    def item_bytes(self, dtype: str) -> tuple[int, ...]:
        """Bytes per element of each parameter, as `held_sizes` counts elements. dtype: that of the base."""
        of = tuple(ITEM_BYTES[self.lora.dtype if adapts else dtype] for adapts in self.is_adapter)
        return (
            tuple(1 if in_nf4 else one for one, in_nf4 in zip(of, self.is_in_nf4, strict=True))
            if self.is_in_nf4
            else of
        )

    @property
    def held_sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter in memory, as DeepSpeed counts them: a byte holds two weights in NF4."""
        if not self.is_in_nf4:
            return self.sizes
        return tuple((s + 1) // 2 if in_nf4 else s for s, in_nf4 in zip(self.sizes, self.is_in_nf4, strict=True))

    @property
    def constants_bytes(self) -> int:
        """Bytes of the constants of blocks in NF4, which every rank holds whole."""
        return sum(constants_bytes(s) for s, in_nf4 in zip(self.sizes, self.is_in_nf4, strict=False) if in_nf4)

    def decoded_bytes(self, dtype: str) -> int:
        """Bytes of the largest weight in NF4 while it is decoded for a product, and of its constants in float32."""
        largest = max((s for s, in_nf4 in zip(self.sizes, self.is_in_nf4, strict=False) if in_nf4), default=0)
        return largest * ITEM_BYTES[dtype] + largest // BLOCK * ITEM_BYTES["float32"]

    @property
    def gathered_sizes(self) -> tuple[int, ...]:
        """Sizes of all parameters that the engine holds: those of a copy of the base follow the policy's."""
        return self.held_sizes * (1 + self.lora.copies_base)

    def forward(self, *, passes: int = 1) -> list[Visit]:
        """Modules in the order of a forward. passes: 2 if a separate forward of the reference precedes the policy's."""
        everything = tuple(range(len(self.gathered_sizes)))
        decoder = tuple(sorted({*self.embedding, *self.norm, *(p for layer in self.layers for p in layer)}))
        layers = [_leaf(f"layer {i}", parameters) for i, parameters in enumerate(self.layers)]
        one = [
            Visit("decoder", (), decoder),
            Visit("embedding", self.embedding, self.embedding),
            Visit("rotary", (), ()),
            *layers,
            Visit("norm", self.norm, self.norm),
        ]
        head = self.reward_head or self.head
        last = Visit("head", head, head)
        if self.lora.copies_base and passes == 2:  # up to its own head
            return [Visit("root", (), everything), *map(self._of_copy, [*one, last]), *one, last]
        return [Visit("root", (), everything), *one * passes, last]

    def _of_copy(self, visit: Visit) -> Visit:
        own, below = (tuple(p + len(self.sizes) for p in places) for places in (visit.own, visit.below))
        return Visit(f"{visit.module} of the copy", own, below, visit.is_leaf)

    def backward(self) -> list[Visit]:
        """Modules in the order of a backward: a frozen head is not needed, the embedding is visited again."""
        root, decoder, embedding, _, *layers, norm, head = self.forward()
        trains_head = bool(self.reward_head) or self.lora.trains_all
        return [root, *([head] if trains_head else []), decoder, norm, *reversed(layers), embedding]


def _leaf(name: str, parameters: tuple[int, ...]) -> Visit:
    return Visit(name, parameters, parameters, is_leaf=True)


def structure_of(config: Any, lora: Lora, quantization: str | None = None) -> Structure:
    """Build the model on the meta device, add adapters, and record its sizes.

    Args:
        quantization: the recipe's `model.quantization`.
    Raises:
        UserError: no causal language model can be built from the config, or the adapters do not fit it.
    """
    base = empty_base(config)
    base.train()
    decoder = base.get_decoder()
    check_base_model(base)
    if quantization is not None:
        check_can_be_nf4(base)
    before = [_form_of(layer) for layer in decoder_layers(decoder)]
    total = len(before)
    if _is_uniform(before, lora.targets) and total > _KEPT:
        keep_layers(decoder, _KEPT)
    policy = whole_policy(base) if lora.trains_all else _adapted(base, lora)
    if lora.has_reference:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a deprecated property of transformers
            policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[POLICY_ADAPTER], autocast_adapter_dtype=False)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.requires_grad = f".{POLICY_ADAPTER}." in name
            parameter.data = parameter.data.to(getattr(torch, lora.dtype))
    adapters = {id(parameter) for name, parameter in policy.named_parameters() if "lora_" in name}
    taken = set() if quantization is None else {id(layer.weight) for _, layer in linear_layers(base)}
    sizes: list[int] = []
    is_trainable: list[bool] = []
    is_adapter: list[bool] = []
    share: list[float] = []
    is_in_nf4: list[bool] = []
    known: dict[int, int] = {}

    def noted(module: nn.Module) -> tuple[int, ...]:
        places = []
        for name, parameter in module.named_parameters():
            if id(parameter) not in known:
                known[id(parameter)] = len(sizes)
                sizes.append(parameter.numel())
                is_trainable.append(parameter.requires_grad)
                is_adapter.append(id(parameter) in adapters)
                is_in_nf4.append(id(parameter) in taken)
                share.append(active_share(config, name))
            places.append(known[id(parameter)])
        return tuple(places)

    embedding = noted(base.get_input_embeddings())
    layers = [noted(layer) for layer in decoder_layers(decoder)]
    while len(layers) < total:  # the layers that were cut are copies of the last one
        first = len(sizes)
        sizes += [sizes[p] for p in layers[-1]]
        is_trainable += [is_trainable[p] for p in layers[-1]]
        is_adapter += [is_adapter[p] for p in layers[-1]]
        is_in_nf4 += [is_in_nf4[p] for p in layers[-1]]
        share += [share[p] for p in layers[-1]]
        layers.append(tuple(range(first, len(sizes))))
    norm = tuple(p for module in _final_norms(decoder) for p in noted(module))
    head = noted(base.get_output_embeddings())
    noted(policy)  # all remaining parameters
    for name, parameter in policy.named_parameters():
        if not is_passed_by_text(config, name):
            share[known[id(parameter)]] = 0.0
    reward_head: tuple[int, ...] = ()
    if lora.has_reward_head:
        reward_head = (len(sizes),)
        sizes.append(int(config.get_text_config().hidden_size))
        is_trainable.append(True)
        is_adapter.append(True)
        is_in_nf4.append(False)
        share.append(1.0)
    return Structure(
        sizes=tuple(sizes),
        is_trainable=tuple(is_trainable),
        is_adapter=tuple(is_adapter),
        active_share=tuple(share),
        layers=tuple(layers),
        embedding=embedding,
        norm=norm,
        head=head,
        reward_head=reward_head,
        config=config.get_text_config(),
        lora=lora,
        sample=policy,
        is_in_nf4=() if quantization is None else tuple(is_in_nf4),
    )


def _adapted(base: Any, lora: Lora) -> Any:
    return accepted_policy(
        base,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        dtype=getattr(torch, lora.dtype),
        experts=lora.experts,
    )


def _final_norms(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's modules next to the layers that have only vectors as parameters; their name varies."""
    layers = decoder_layers(decoder)
    beside = (module for module in decoder.children() if module is not layers)
    return [
        module
        for module in beside
        if (parameters := list(module.parameters())) and all(parameter.dim() == 1 for parameter in parameters)
    ]


def _form_of(layer: nn.Module) -> tuple[Any, ...]:
    """A layer's class, and the names and shapes of its parameters."""
    shapes = ((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return (type(layer), *shapes)


def _is_uniform(layers: list[tuple[Any, ...]], targets: Literal["all-linear"] | list[str]) -> bool:
    """Whether one layer represents all: one class, equal shapes, and no target that names a layer by its number."""
    names_a_layer = targets != "all-linear" and any(re.search(r"\.\d+\.", f".{target}.") for target in targets)
    return len(set(layers)) == 1 and not names_a_layer
