"""The forward pass over all tokens, shared by frozen and trainable heads. N tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head, chunks_of, sweep_vocabulary
from uft_ds.kernels.logits import accumulation_dtype, without_autocast
from uft_ds.kernels.rows import RowValues, joined, no_columns_yet, values_of


class TokenStatistics(NamedTuple):
    """By-products of a stream's log-probs, without gradient. [N] each."""

    entropy_N: Tensor
    """Entropy of the distribution over the vocabulary, float32, nats."""
    is_top1_N: Tensor
    """Whether no token of the vocabulary has a larger logit than the target."""


class HeadOutput(NamedTuple):
    """The outputs of a head, one entry for each stream, in the order of the call."""

    logps: tuple[Tensor, ...]
    """[N] each, float32, nats."""
    gradients: tuple[Tensor, ...]
    """d logp / d hidden of the first `with_gradients` streams: [N, D] each, in the hidden states' dtype."""
    statistics: tuple[TokenStatistics, ...]
    """One entry for each stream; empty if statistics were not requested."""


@torch.no_grad()
def forward_pass(
    hidden_states: Seq[Tensor], head: Head, targets_N: Tensor, *, with_gradients: int, with_statistics: bool
) -> tuple[HeadOutput, list[RowValues]]:
    """Compute all tokens, chunk by chunk, without a graph.

    Args:
        hidden_states: of each stream, [N, D]; at least one stream.
        with_gradients: the number of streams whose gradients are computed; they come first.
    Returns:
        the output, and each stream's `RowValues`.
    Raises:
        ValueError: shapes, dtypes or devices do not match.
        IndexError: a target is outside the vocabulary, on a CPU. On a GPU the check would have to wait for the device;
            there the token's log-prob becomes NaN.
    """
    check_inputs(hidden_states, head, targets_N)
    _check_targets(targets_N, len(head.weight_VD))
    like_ND = hidden_states[0]
    dtype, device = accumulation_dtype(like_ND.dtype), like_ND.device
    gradients = tuple(torch.empty_like(hidden_ND) for hidden_ND in hidden_states[:with_gradients])
    # A part without rows makes `joined` work for a call without tokens.
    none = values_of(no_columns_yet(0, dtype, device, with_entropy=with_statistics))
    parts: list[list[RowValues]] = [[none] for _ in hidden_states]
    tile = head.tile(len(targets_N), len(hidden_states))
    for chunk in chunks_of(hidden_states, targets_N, tile.rows):
        with without_autocast(device):
            values, gradients_KD = sweep_vocabulary(
                chunk, head, tile.width, with_gradients=with_gradients, with_entropy=with_statistics
            )
        for number, of_stream in enumerate(parts):
            of_stream.append(values.at(chunk.rows_of(number)))
        if gradients_KD is not None:
            for number, gradients_ND in enumerate(gradients):
                gradients_ND[chunk.tokens] = gradients_KD[chunk.rows_of(number)]
    streams = [joined(of_stream) for of_stream in parts]
    statistics = tuple(TokenStatistics(s.entropy_R, s.is_top1_R) for s in streams if s.entropy_R is not None)
    return HeadOutput(tuple(stream.logps_R for stream in streams), gradients, statistics), streams


def check_inputs(hidden_states: Seq[Tensor], head: Head, targets_N: Tensor) -> None:
    """Refuse inputs that torch would silently broadcast, round, truncate or interpret as a mask.

    Raises:
        ValueError: the message names the argument, what was found and what is expected.
    """
    weight_VD, chunk_bytes = head.weight_VD, head.chunk_bytes
    if weight_VD.ndim != 2 or len(weight_VD) == 0 or not weight_VD.is_floating_point():
        raise ValueError(
            f"weight: {weight_VD.dtype} of shape {list(weight_VD.shape)}, expected numbers of [vocabulary, hidden size]"
        )
    if targets_N.ndim != 1 or targets_N.dtype != torch.int64 or targets_N.device != weight_VD.device:
        raise ValueError(
            f"targets: {targets_N.dtype} of shape {list(targets_N.shape)} on {targets_N.device}, "
            f"expected torch.int64 of [tokens] on {weight_VD.device}"
        )
    if chunk_bytes is not None and (type(chunk_bytes) is not int or chunk_bytes <= 0):
        raise ValueError(f"chunk_bytes: {chunk_bytes!r}, expected a positive whole number of bytes, or None")
    vocabulary, dim = weight_VD.shape
    tokens = len(targets_N)
    names = ["hidden", *(f"others[{number}]" for number in range(len(hidden_states) - 1))]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (hidden_ND, (tokens, dim)) for name, hidden_ND in zip(names, hidden_states, strict=True)
    }
    if head.bias_V is not None:
        expected["bias"] = (head.bias_V, (vocabulary,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}, expected {list(shape)} to go with {tokens} targets "
                f"and a weight of {vocabulary} x {dim}"
            )
        is_other_type = tensor.dtype != weight_VD.dtype and (name != "bias" or not tensor.is_floating_point())
        if tensor.device != weight_VD.device or is_other_type:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, expected {weight_VD.dtype} on {weight_VD.device} "
                "like the weight: cast it, or the weight"
            )


def _check_targets(targets_N: Tensor, vocabulary: int) -> None:
    if targets_N.device.type != "cpu":
        return  # reading the result would wait for the GPU
    (outside,) = ((targets_N < 0) | (targets_N >= vocabulary)).nonzero(as_tuple=True)
    if len(outside):
        first = int(outside[0])
        raise IndexError(
            f"targets[{first}] is {int(targets_N[first])}, expected 0 to {vocabulary - 1} ({len(outside)} of "
            f"{len(targets_N)} targets lie outside; token_logps takes -100 for tokens that are not asked for)"
        )
