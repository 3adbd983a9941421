"""One visit of each base weight serves all streams: the trained ones with a gradient, the others without.

Trained streams travel as a layer's arguments and results, so that autograd's and ZeRO's hooks see them: one tensor, or
a tuple of several. Streams without gradient ride beside them in `Lanes`, a keyword that reaches every decoder layer
unchanged. Under ZeRO-3 a layer is then gathered once for all streams, where separate forwards gather it again.

Layers and the final norm get a dynamic subclass as their class. Names and state dicts stay what they are; a wrapping
module would rename every adapter, and a patched `forward` would survive a `deepcopy` bound to the original.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uft_ds.architectures.facts import decoder_layers, final_norm, names_in_lockstep, shown_in_lockstep
from uft_ds.errors import UserError
from uft_ds.streams.adapters import as_stream
from uft_ds.streams.stream import Stream

Hidden = Tensor | tuple[Tensor, ...]
"""[1, tokens, hidden]: what passes from layer to layer."""


@dataclass
class Lanes:
    """The streams of one visit, and the hidden states of those without gradient on their way through the layers.

    streams: trained ones first, as `trained_first` orders them.
    hidden: by name, [1, tokens, hidden]. Only the newest is held: nothing of these streams waits for the backward.
    """

    streams: tuple[Stream, ...]
    hidden: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[Stream, ...]:
        return tuple(stream for stream in self.streams if stream.trained)

    @property
    def frozen(self) -> tuple[Stream, ...]:
        return tuple(stream for stream in self.streams if not stream.trained)


def enable_lockstep(base: Any) -> None:
    """Let `base.get_decoder()(..., lanes=Lanes(streams))` return all streams as its `last_hidden_state`, a tuple.

    Without `lanes` the model computes what it computed before.

    Raises:
        UserError: layers of a class that this has not been shown to work with.
    """
    lockstep_layer = _lockstep_layer(check_lockstep(base))
    decoder = base.get_decoder()
    layers = decoder_layers(decoder)
    for layer in layers:
        layer.__class__ = lockstep_layer
    # A layer cannot know its place, and the last one has to hand on the streams without gradient too.
    layers[-1].hands_all_on = True
    norm = final_norm(decoder)
    norm.__class__ = _lockstep_norm(type(norm))


def check_lockstep(base: Any) -> Any:
    """The class of a base's decoder layers, all of which are alike; nothing is changed.

    Raises:
        UserError: layers of a class that lockstep has not been shown to work with.
    """
    layer_classes = {type(layer) for layer in decoder_layers(base.get_decoder())}
    unknown = sorted({layer_class.__name__ for layer_class in layer_classes} - set(shown_in_lockstep()))
    if unknown or len(layer_classes) != 1:
        raise UserError(
            f"reference.mode: lockstep has not been shown to work with {type(base).__name__}, whose layers are "
            f"{', '.join(unknown)} (shown: {', '.join(names_in_lockstep())}); take reference.mode: separate"
        )
    return layer_classes.pop()


def _lockstep_layer(layer_class: Any) -> type[nn.Module]:
    def call(self: Any, hidden: Hidden, *args: Any, **kwargs: Any) -> Hidden:
        # Hooks look for tensors among the arguments, not inside of them: in a tuple, a leaf module's gradients would be
        # reduced before they exist.
        spread = (hidden,) if isinstance(hidden, Tensor) else hidden
        result: Hidden = layer_class.__call__(self, *spread, *args, **kwargs)
        return result

    def forward(self: Any, *args: Any, lanes: Lanes | None = None, **kwargs: Any) -> Hidden:
        if lanes is None:
            return _checkpointed(self, partial(layer_class.forward, self, **kwargs), *args)

        def run(stream: Stream, hidden_1TD: Tensor) -> Tensor:
            # In here, so that a recomputation in the backward finds the stream's own adapter again.
            with as_stream(self, stream):
                hidden: Tensor = layer_class.forward(self, hidden_1TD, **kwargs)
            return hidden

        for stream in lanes.frozen:
            with torch.no_grad():
                lanes.hidden[stream.name] = run(stream, lanes.hidden.get(stream.name, args[0]))
        trained = lanes.trained
        # The embedding is the same for all; no layer changes what travels where no stream is trained.
        arrived = args if len(args) == len(trained) else args[:1] * len(trained)
        left = tuple(
            _checkpointed(self, partial(run, stream), hidden_1TD)
            for stream, hidden_1TD in zip(trained, arrived, strict=True)
        )
        if self.hands_all_on:
            return left + tuple(lanes.hidden[stream.name] for stream in lanes.frozen)
        if not left:
            return args[0]
        return left if len(left) > 1 else left[0]

    lockstep: Any = type(f"Lockstep{layer_class.__name__}", (layer_class,), {"hands_all_on": False, "__call__": call})
    # Not in the class body: transformers wraps what it finds there, and would checkpoint all streams together.
    lockstep.forward = forward
    return lockstep


def _checkpointed(layer: Any, run: Any, *args: Any) -> Tensor:
    """Only trained streams are saved and recomputed, each by itself."""
    checkpoints = layer.gradient_checkpointing and layer.training
    hidden: Tensor = layer._gradient_checkpointing_func(run, *args) if checkpoints else run(*args)
    return hidden


def _lockstep_norm(norm_class: Any) -> type[nn.Module]:
    def forward(self: Any, hidden: Hidden) -> Hidden:
        if isinstance(hidden, Tensor):
            normed: Tensor = norm_class.forward(self, hidden)
            return normed
        return tuple(_normed(self, hidden_1TD) for hidden_1TD in hidden)

    def _normed(self: Any, hidden_1TD: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden_1TD.requires_grad):
            normed: Tensor = norm_class.forward(self, hidden_1TD)
        return normed

    return type(f"Lockstep{norm_class.__name__}", (norm_class,), {"forward": forward})
