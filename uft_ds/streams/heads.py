"""The heads of streams: the model's own, from hidden states to log-probs, and one that gives a number.

N supervised tokens, R responses, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from uft_ds.errors import UserError
from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.kernels.trainable_head import differentiable_logps
from uft_ds.streams.stream import Output


class LogpHead(nn.Linear):
    """A linear head that also turns hidden states into log-probs.

    Under ZeRO-3 only the head's own forward may touch its weight: reading it anywhere else registers it with the
    reader and adds gathers. One call serves all streams, and with a frozen weight the backward too.
    """

    transform: LogitTransform = UNCHANGED
    chunk_bytes: int | None = None

    def forward(  # type: ignore[override] # a superset of nn.Linear's
        self, hidden: Tensor | tuple[Tensor, ...], targets_N: Tensor | None = None, with_gradients: int = 0
    ) -> Tensor | HeadOutput:
        """What nn.Linear gives; or, of a tuple of streams, log-probs, linked to the hidden states by `head_outputs`.

        Args:
            hidden: with targets: of each stream, [N, D].
            with_gradients: so many streams carry a gradient, from the first on.
        """
        if targets_N is None:
            assert isinstance(hidden, Tensor)
            return super().forward(hidden)
        head = Head(self.weight, self.bias, self.transform, self.chunk_bytes)
        logps = differentiable_logps if is_trainable(self) and torch.is_grad_enabled() else logps_and_gradients
        return logps(tuple(hidden), head, targets_N, with_gradients=with_gradients, with_statistics=True)


class ScalarHead(nn.Linear):
    """One number from a hidden state, float32: `score` of Hugging Face's sequence classifiers, without a bias."""

    def __init__(self, hidden_size: int, *, std: float) -> None:
        """Weights drawn with `std`, equal on every rank."""
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.weight.normal_(std=std, generator=torch.Generator(self.weight.device).manual_seed(0))

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """[R]."""
        return super().forward(hidden_RD.float()).squeeze(-1)


def make_logp_head(model: nn.Module, *, chunk_bytes: int | None = None) -> LogpHead:
    """Teach the model's own output layer to give log-probs; its name, its weight and what it does to logits stay.

    Args:
        chunk_bytes: memory for logits at a time; None for what suits the device.
    Raises:
        UserError: an output layer that is not a plain nn.Linear, one with adapters for example.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head_class = type(head)
    if head_class is not nn.Linear:
        raise UserError(f"model.base: {type(model).__name__} has a head of type {head_class.__name__}, not Linear")
    head.__class__ = LogpHead
    head.transform, head.chunk_bytes = logit_transform_of(model.config), chunk_bytes
    assert isinstance(head, LogpHead)
    return head


MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names of it in configurations: Cohere's, Muse's, Falcon-H1's."""


def logit_transform_of(config: Any) -> LogitTransform:
    """What a Hugging Face model does to its logits after the head, by the names its configuration uses for it.

    Other models do more, or under other names: the check at the start compares with the model's own logits.
    """
    scale = next((float(found) for name in MULTIPLIERS if (found := getattr(config, name, None))), 1.0)
    divisor = getattr(config, "logits_scaling", None)  # Granite, MiniCPM3; HyperCLOVA X multiplies by it
    if divisor:
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None) or None)  # Gemma 2


def head_outputs(head: LogpHead, hidden_states: Seq[Tensor], targets_N: Tensor, *, trained: int) -> list[Output]:
    """Log-probs of the targets and their statistics, stream by stream.

    Args:
        hidden_states: of each stream, [N, D].
        trained: so many streams carry a gradient, from the first on.
    """
    with_gradients = trained if torch.is_grad_enabled() else 0
    if is_trainable(head):
        output: HeadOutput = head(tuple(hidden_states), targets_N, with_gradients)
        logps = output.logps
    else:
        with_gradients = with_gradients if all(h.requires_grad for h in hidden_states[:trained]) else 0
        output = head(tuple(hidden_ND.detach() for hidden_ND in hidden_states), targets_N, with_gradients)
        logps = attached(hidden_states, output)
    return [
        Output(logps_N, of_stream.entropy_N, of_stream.is_top1_N)
        for logps_N, of_stream in zip(logps, output.statistics, strict=True)
    ]


def is_trainable(head: nn.Linear) -> bool:
    """Asked through `parameters()`: ZeRO-3 notices who reads `head.weight` and gathers it for the reader ever after."""
    return any(parameter.requires_grad for parameter in head.parameters())
