"""The model's own head as the engine calls it: hidden states in, log-probs out.

N supervised tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uft_ds.architectures.facts import logit_scale_and_cap
from uft_ds.errors import UserError
from uft_ds.kernels.forward import HeadOutput
from uft_ds.kernels.frozen_head import attach, logps_and_gradients
from uft_ds.kernels.logits import UNCHANGED, LogitTransform, mm_float32
from uft_ds.kernels.trainable_head import differentiable_logps


class LogpHead(nn.Linear):
    """A linear head that also turns hidden states into log-probs.

    Under ZeRO-3 only the head's own forward may touch its weight: reading it anywhere else registers it with the
    reader and adds gathers. One call serves policy and reference, and with a frozen weight the backward too.
    """

    transform: LogitTransform = UNCHANGED
    chunk_bytes: int | None = None
    in_float32: bool = False
    """Whether plain calls give logits in float32: a model's own forward then rounds none, whatever its dtype."""

    def forward(  # type: ignore[override] # a superset of nn.Linear's
        self,
        hidden: Tensor,
        targets_N: Tensor | None = None,
        reference_hidden_ND: Tensor | None = None,
        with_gradients: bool = False,
    ) -> Tensor | HeadOutput:
        """What nn.Linear gives; or, with targets, log-probs, linked to the hidden states by `head_logps`."""
        if targets_N is None:
            return self._float32_logits(hidden) if self.in_float32 else super().forward(hidden)
        options: dict[str, Any] = {
            "reference_hidden_ND": reference_hidden_ND,
            "bias_V": self.bias,
            "transform": self.transform,
            "chunk_bytes": self.chunk_bytes,
        }
        if is_trainable(self) and torch.is_grad_enabled():
            return differentiable_logps(hidden, self.weight, targets_N, **options)
        return logps_and_gradients(hidden, self.weight, targets_N, with_gradients=with_gradients, **options)

    def _float32_logits(self, hidden: Tensor) -> Tensor:
        logits_TV = mm_float32(hidden.flatten(0, -2), self.weight.t())
        if self.bias is not None:
            logits_TV = logits_TV + self.bias.float()
        return logits_TV.view(*hidden.shape[:-1], -1)


@contextmanager
def logits_in_float32(head: LogpHead) -> Iterator[None]:
    """Within the block, what the model's own forward does after the head is done to float32 logits.

    A logit between 16 and 32 rounded to bfloat16 is off by up to 0.06: more than a wrong factor of 1.02 does to many.
    """
    head.in_float32 = True
    try:
        yield
    finally:
        head.in_float32 = False


def make_logp_head(model: nn.Module, *, chunk_bytes: int | None = None) -> LogpHead:
    """Teach the model's own output layer to give log-probs; its name, its weight and what it does to logits stay.

    Args:
        chunk_bytes: memory for logits at a time; None for what suits the device.
    Raises:
        UserError: an output layer that is not a plain nn.Linear, one with adapters for example.
    """
    head = plain_head(model)
    head.__class__ = LogpHead
    head.transform, head.chunk_bytes = logit_transform_of(model.config), chunk_bytes
    assert isinstance(head, LogpHead)
    return head


def plain_head(model: nn.Module) -> Any:
    """The model's output layer.

    Raises:
        UserError: not a plain nn.Linear: what a subclass does in its forward would be lost.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        raise UserError(f"model.base: {type(model).__name__} has a head of type {type(head).__name__}, not Linear")
    return head


def logit_transform_of(config: Any) -> LogitTransform:
    """What a Hugging Face model does to its logits after the head."""
    scale, softcap = logit_scale_and_cap(config)
    return LogitTransform(scale, softcap)


def head_logps(
    head: LogpHead, hidden_ND: Tensor, targets_N: Tensor, reference_hidden_ND: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets under policy, with gradient, and reference, without: [N] each, float32, nats."""
    if is_trainable(head):
        output: HeadOutput = head(hidden_ND, targets_N, reference_hidden_ND)
        return output.logps_N, output.reference_logps_N
    with_gradients = torch.is_grad_enabled() and hidden_ND.requires_grad
    output = head(hidden_ND.detach(), targets_N, reference_hidden_ND, with_gradients)
    if output.gradients_ND is None:
        return output.logps_N, output.reference_logps_N
    return attach(hidden_ND, output.logps_N, output.gradients_ND), output.reference_logps_N


def is_trainable(head: nn.Linear) -> bool:
    """Asked through `parameters()`: ZeRO-3 notices who reads `head.weight` and gathers it for the reader ever after."""
    return any(parameter.requires_grad for parameter in head.parameters())
