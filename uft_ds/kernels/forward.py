"""The forward that frozen and trainable heads share. N tokens, D hidden size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head, chunks_of, sweep_vocabulary
from uft_ds.kernels.logits import accumulation_dtype, without_autocast
from uft_ds.kernels.rows import RowValues, joined, no_columns_yet, values_of


class TokenStatistics(NamedTuple):
    """By-products of the policy's log-probs, without gradient. [N] each."""

    entropy_N: Tensor
    """Of the distribution over the vocabulary, float32, nats."""
    is_top1_N: Tensor
    """No token of the vocabulary has a larger logit than the target."""


class HeadOutput(NamedTuple):
    """What a head makes of hidden states."""

    logps_N: Tensor
    """Policy, float32, nats."""
    gradients_ND: Tensor | None
    """d logp / d hidden of the policy, in the hidden states' dtype; None where not asked for."""
    reference_logps_N: Tensor | None
    statistics: TokenStatistics | None


@torch.no_grad()
def forward_pass(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    reference_hidden_ND: Tensor | None,
    *,
    with_gradients: bool,
    with_statistics: bool,
    chunk_bytes: int | None,
) -> tuple[HeadOutput, RowValues]:
    """All tokens, chunk by chunk, linked to nothing; the second result is the policy's.

    Raises:
        ValueError: shapes, types or devices that do not belong together.
        IndexError: a target outside the vocabulary, on CPU. On a GPU, which would have to be waited for, its log-prob
            becomes NaN.
    """
    check_inputs(hidden_ND, head, targets_N, reference_hidden_ND, chunk_bytes)
    _check_targets(targets_N, len(head.weight_VD))
    dtype, device = accumulation_dtype(hidden_ND.dtype), hidden_ND.device
    gradients_ND = torch.empty_like(hidden_ND) if with_gradients else None
    policy_parts = [values_of(no_columns_yet(0, dtype, device, with_entropy=with_statistics))]
    reference_parts = [*policy_parts]
    streams = 1 if reference_hidden_ND is None else 2
    tile = head.tile(len(targets_N), streams, chunk_bytes, with_entropy=with_statistics)
    for chunk in chunks_of(hidden_ND, targets_N, reference_hidden_ND, tile.rows):
        with without_autocast(device):
            values, gradients_CD = sweep_vocabulary(
                chunk, head, tile.width, with_gradients=with_gradients, with_entropy=with_statistics
            )
        policy_parts.append(values.at(chunk.policy_rows))
        if reference_hidden_ND is not None:
            reference_parts.append(values.at(chunk.reference_rows))
        if gradients_ND is not None and gradients_CD is not None:
            gradients_ND[chunk.tokens] = gradients_CD
    policy = joined(policy_parts)
    output = HeadOutput(
        policy.logps_R,
        gradients_ND,
        None if reference_hidden_ND is None else joined(reference_parts).logps_R,
        None if policy.entropy_R is None else TokenStatistics(policy.entropy_R, policy.is_top1_R),
    )
    return output, policy


def check_inputs(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    reference_hidden_ND: Tensor | None,
    chunk_bytes: int | None,
) -> None:
    """Refuse what torch would broadcast, round, truncate or take for a mask without a word.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    weight_VD = head.weight_VD
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
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"hidden": (hidden_ND, (tokens, dim))}
    if reference_hidden_ND is not None:
        expected["reference_hidden"] = (reference_hidden_ND, (tokens, dim))
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
        return
    (outside,) = ((targets_N < 0) | (targets_N >= vocabulary)).nonzero(as_tuple=True)
    if len(outside):
        first = int(outside[0])
        raise IndexError(
            f"targets[{first}] is {int(targets_N[first])}, expected 0 to {vocabulary - 1} ({len(outside)} of "
            f"{len(targets_N)} targets lie outside; token_logps takes -100 for tokens that are not asked for)"
        )
