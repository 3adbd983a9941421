"""The heads of streams: the model's own head, which returns log-probs, and a scalar head.

N supervised tokens, R responses, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from uft_ds.architectures.facts import logit_scale_and_cap
from uft_ds.errors import UserError
from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.logits import UNCHANGED, LogitTransform, mm_float32
from uft_ds.kernels.trainable_head import differentiable_logps
from uft_ds.streams.stream import Output


class LogpHead(nn.Linear):
    """A linear head that also turns hidden states into log-probs.

    Under ZeRO-3 only the head's own forward may read its weight: a read by another module registers the weight with
    that module and adds gathers. One call serves all streams. If the weight is frozen, the call also computes the
    hidden states' gradients, so the backward does not need the weight.
    """

    transform: LogitTransform = UNCHANGED
    chunk_bytes: int | None = None
    in_float32: bool = False
    """Whether plain calls return float32 logits, so that the model's own forward rounds no logit to its dtype."""

    def forward(  # type: ignore[override] # a superset of nn.Linear's
        self,
        hidden: Tensor | tuple[Tensor, ...],
        targets_N: Tensor | None = None,
        with_gradients: int = 0,
        *,
        with_statistics: bool = False,
    ) -> Tensor | HeadOutput:
        """The output of nn.Linear; or, given targets, the log-probs of several streams.

        `head_outputs` links the log-probs of a frozen head to the hidden states.

        Args:
            hidden: if targets are given, the hidden states of each stream, [N, D]; else those of a plain call.
            with_gradients: the number of streams that carry a gradient; they come first.
            with_statistics: whether the output holds statistics of each stream; no log-prob depends on it.
        """
        if targets_N is None:
            assert isinstance(hidden, Tensor)
            return self._float32_logits(hidden) if self.in_float32 else super().forward(hidden)
        head = Head(self.weight, self.bias, self.transform, self.chunk_bytes)
        logps = differentiable_logps if is_trainable(self) and torch.is_grad_enabled() else logps_and_gradients
        return logps(tuple(hidden), head, targets_N, with_gradients=with_gradients, with_statistics=with_statistics)

    def _float32_logits(self, hidden: Tensor) -> Tensor:
        logits_TV = mm_float32(hidden.flatten(0, -2), self.weight.t())
        if self.bias is not None:
            logits_TV = logits_TV + self.bias.float()
        return logits_TV.view(*hidden.shape[:-1], -1)


class ScalarHead(nn.Linear):
    """One float32 number from a hidden state, like `score` of Hugging Face's sequence classifiers, without a bias."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        """Draw the weights from `seed`, equal on every rank.

        Their standard deviation is 1 / (hidden_size + 1): entries of hidden states are of order 1, so values begin near
        0 and the loss of a pair near log 2.
        """
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            generator = torch.Generator(self.weight.device).manual_seed(seed)
            self.weight.normal_(std=1 / (hidden_size + 1), generator=generator)
        self.to(dtype)

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """One value for each row of hidden states: [R], float32."""
        return scalar_values(hidden_RD, self.weight)


def scalar_values(hidden_RD: Tensor, weight_1D: Tensor) -> Tensor:
    """The values of a scalar head: [R], float32, whatever the types of hidden states and weights.

    Args:
        weight_1D: [1, hidden].
    """
    return F.linear(hidden_RD.float(), weight_1D.float()).squeeze(-1)


@contextmanager
def logits_in_float32(head: LogpHead) -> Iterator[None]:
    """Within the block, the head returns float32 logits, so the model's own forward continues in float32.

    Rounding a logit between 16 and 32 to bfloat16 changes it by up to 0.06, which is more than a wrong factor of 1.02
    changes many logits.
    """
    head.in_float32 = True
    try:
        yield
    finally:
        head.in_float32 = False


def make_logp_head(model: nn.Module, *, chunk_bytes: int | None = None) -> LogpHead:
    """Turn the model's output layer into a `LogpHead` in place; its name, weight and logit transform stay the same.

    Args:
        chunk_bytes: memory for the logits that are held at once; None: a default for the device.
    Raises:
        UserError: the output layer is not a plain nn.Linear, for example because it has an adapter.
    """
    head = plain_head(model)
    # Changing the class keeps the module, its name and its parameter, which ZeRO-3 may have partitioned already.
    head.__class__ = LogpHead
    head.transform, head.chunk_bytes = logit_transform_of(model.config), chunk_bytes
    assert isinstance(head, LogpHead)
    return head


def plain_head(model: nn.Module) -> Any:
    """The model's output layer.

    Raises:
        UserError: it is not a plain nn.Linear. The extra work that a subclass does in its forward would be lost.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        raise UserError(f"model.base: {type(model).__name__} has a head of type {type(head).__name__}, not Linear")
    return head


def logit_transform_of(config: Any) -> LogitTransform:
    """The scaling and capping that a Hugging Face model applies to its logits after the head."""
    scale, softcap = logit_scale_and_cap(config)
    return LogitTransform(scale, softcap)


def head_outputs(
    head: LogpHead, hidden_states: Seq[Tensor], targets_N: Tensor, *, trained: int, with_statistics: bool
) -> list[Output]:
    """Log-probs of the targets and, if they are asked for, their statistics, stream by stream.

    Args:
        hidden_states: of each stream, [N, D].
        trained: the number of trained streams; they come first.
        with_statistics: whether to compute them, of all streams: rows of all streams then pass the same sweep, which
            makes equal rows give equal bits.
    """
    with_gradients = trained if torch.is_grad_enabled() else 0
    if is_trainable(head):
        output: HeadOutput = head(tuple(hidden_states), targets_N, with_gradients, with_statistics=with_statistics)
        logps = output.logps
    else:
        with_gradients = with_gradients if all(h.requires_grad for h in hidden_states[:trained]) else 0
        detached = tuple(hidden_ND.detach() for hidden_ND in hidden_states)
        output = head(detached, targets_N, with_gradients, with_statistics=with_statistics)
        logps = attached(hidden_states, output)
    if not with_statistics:
        return [Output(logps_N) for logps_N in logps]
    return [
        Output(logps_N, of_stream.entropy_N, of_stream.is_top1_N)
        for logps_N, of_stream in zip(logps, output.statistics, strict=True)
    ]


def is_trainable(head: nn.Linear) -> bool:
    """Whether a parameter of the head is trained."""
    # `head.weight` is not read: ZeRO-3 would record the module that reads it and gather the weight for it from then on.
    return any(parameter.requires_grad for parameter in head.parameters())
