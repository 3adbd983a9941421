"""The forward that frozen and trainable heads share. N tokens, D hidden size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head, chunks_of, sweep_vocabulary
from uft_ds.kernels.logits import accumulation_dtype
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
        ValueError: shapes that do not belong together.
        IndexError: a target outside the vocabulary, on CPU; looking would make a GPU wait, there it becomes NaN.
    """
    _check(hidden_ND, head, targets_N, reference_hidden_ND)
    dtype, device = accumulation_dtype(hidden_ND.dtype), hidden_ND.device
    gradients_ND = torch.empty_like(hidden_ND) if with_gradients else None
    policy_parts = [values_of(no_columns_yet(0, dtype, device, with_entropy=with_statistics))]
    reference_parts = [*policy_parts]
    tile = head.tile(len(targets_N), 1 if reference_hidden_ND is None else 2, chunk_bytes)
    for chunk in chunks_of(hidden_ND, targets_N, reference_hidden_ND, tile.rows):
        sums, gradients_CD = sweep_vocabulary(
            chunk, head, tile.width, with_gradients=with_gradients, with_entropy=with_statistics
        )
        values = values_of(sums)
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


def _check(hidden_ND: Tensor, head: Head, targets_N: Tensor, reference_hidden_ND: Tensor | None) -> None:
    vocabulary, dim = head.weight_VD.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"hidden": (hidden_ND, (len(targets_N), dim))}
    if reference_hidden_ND is not None:
        expected["reference_hidden"] = (reference_hidden_ND, (len(targets_N), dim))
    if head.bias_V is not None:
        expected["bias"] = (head.bias_V, (vocabulary,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}, expected {list(shape)} for {len(targets_N)} targets "
                f"and a weight of {vocabulary} x {dim}"
            )
    if targets_N.device.type == "cpu" and len(targets_N):
        lowest, highest = int(targets_N.min()), int(targets_N.max())
        if lowest < 0 or highest >= vocabulary:
            raise IndexError(f"targets from {lowest} to {highest}, expected 0 to {vocabulary - 1}")
