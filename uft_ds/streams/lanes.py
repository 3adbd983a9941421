"""One visit of each base weight serves both streams: the policy's, with adapters and gradient, and the reference's.

The policy's row goes through Hugging Face's own `forward`; the reference rides beside it in a `ReferenceLane`, a
keyword that reaches every decoder layer unchanged. Under ZeRO-3 a layer is then gathered once for both streams, where
two forwards gather it twice.

Layers and the final norm get a dynamic subclass as their class. Names and state dicts stay what they are; a wrapping
module would rename every adapter, and a patched `forward` would survive a `deepcopy` bound to the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uft_ds.architectures.facts import shown_in_lockstep
from uft_ds.errors import UserError
from uft_ds.streams.adapters import as_reference

SHOWN_TO_WORK = shown_in_lockstep()
"""Decoder layers that the tests hold against two separate forwards and Hugging Face's own."""

BothStreams = tuple[Tensor, Tensor]
"""Policy and reference, [1, tokens, hidden] each; the second without gradient."""


@dataclass
class ReferenceLane:
    """The reference's hidden state on its way through the layers; None before the first.

    hidden_1TD: [1, tokens, hidden]. Only the newest is held: nothing of the reference waits for the backward.
    """

    hidden_1TD: Tensor | None = None


def enable_lockstep(base: Any) -> None:
    """Let `base.get_decoder()(..., lane=ReferenceLane())` return both streams as its `last_hidden_state`.

    Without `lane` the model computes what it computed before.

    Raises:
        UserError: layers of a class that this has not been shown to work with.
    """
    decoder = base.get_decoder()
    layer_classes = {type(layer) for layer in decoder.layers}
    unknown = sorted({layer_class.__name__ for layer_class in layer_classes} - set(SHOWN_TO_WORK))
    if unknown or len(layer_classes) != 1:
        raise UserError(
            f"reference.mode: lockstep has not been shown to work with {type(base).__name__}, whose layers are "
            f"{', '.join(unknown)} (shown: {', '.join(SHOWN_TO_WORK)}); take reference.mode: separate"
        )
    lockstep_layer = _lockstep_layer(layer_classes.pop())
    for layer in decoder.layers:
        layer.__class__ = lockstep_layer
    # A layer cannot know its place, and the last one has to hand the reference on.
    decoder.layers[-1].hands_reference_on = True
    decoder.norm.__class__ = _lockstep_norm(type(decoder.norm))


def _lockstep_layer(layer_class: Any) -> type[nn.Module]:
    def forward(
        self: Any, hidden_1TD: Tensor, *args: Any, lane: ReferenceLane | None = None, **kwargs: Any
    ) -> Tensor | BothStreams:
        run = partial(layer_class.forward, self, **kwargs)
        if lane is not None:
            with torch.no_grad(), as_reference(self):
                lane.hidden_1TD = run(hidden_1TD if lane.hidden_1TD is None else lane.hidden_1TD, *args)
        if self.gradient_checkpointing and self.training:
            # Only the policy is saved and recomputed: its adapters are on again when the backward comes.
            hidden_1TD = self._gradient_checkpointing_func(run, hidden_1TD, *args)
        else:
            hidden_1TD = run(hidden_1TD, *args)
        if lane is None or not self.hands_reference_on:
            return hidden_1TD
        assert lane.hidden_1TD is not None
        return hidden_1TD, lane.hidden_1TD

    lockstep: Any = type(f"Lockstep{layer_class.__name__}", (layer_class,), {"hands_reference_on": False})
    # Not in the class body: transformers wraps what it finds there, and would checkpoint both streams.
    lockstep.forward = forward
    return lockstep


def _lockstep_norm(norm_class: Any) -> type[nn.Module]:
    def forward(self: Any, hidden: Tensor | BothStreams) -> Tensor | BothStreams:
        if isinstance(hidden, Tensor):
            normed: Tensor = norm_class.forward(self, hidden)
            return normed
        policy_1TD, reference_1TD = hidden
        with torch.no_grad():
            reference_1TD = norm_class.forward(self, reference_1TD)
        return norm_class.forward(self, policy_1TD), reference_1TD

    return type(f"Lockstep{norm_class.__name__}", (norm_class,), {"forward": forward})
