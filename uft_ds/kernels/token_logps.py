"""Per-token log-probabilities of one or more streams from hidden states, without ever holding all logits.

N tokens, D hidden size, V vocabulary. The modules, from the outside in:

    token_logps                    the functions to call
    frozen_head, trainable_head    how log-probs are linked to what they were computed from
    forward                        all tokens: chunk after chunk
    chunks, tiles                  one chunk: over the vocabulary, tile after tile; how large they are
    rows                           one tile of logits: what is kept of it
    sweeps, rows_torch, rows_triton  which implementation sweeps over a tile; the two of them
    logits, naive                  scaling and exact matmuls; the definition
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput, TokenStatistics, check_inputs
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.kernels.trainable_head import differentiable_logps

IGNORED = -100
"""The target of a token whose log-prob is not asked for, as in torch's cross_entropy."""


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    others_ND: Seq[Tensor] = (),
    bias: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """`naive_token_logps` of several streams by one matmul a chunk: the first with gradient, the others without.

    Gradients flow to `hidden_ND`, and to `weight_VD` and `bias` where they require them: a frozen head is one that
    does not require a gradient. First derivatives only. All inputs have one dtype (but for `bias`) and one device.
    Equal rows of two streams give equal bits.

    Args:
        targets_N: token ids, int64; a row with `IGNORED` is not computed: its log-prob and gradient are 0. (To find
            such rows a GPU is waited for; not by `logps_and_gradients` and `attached`, which take asked rows only.)
        others_ND: hidden states of further streams, [N, D] each, without gradient.
        bias: [V]. transform: what the model does to its logits.
        chunk_bytes: memory for logits. Enough of it for some hundred rows of the whole vocabulary, and whole rows are
            taken; less, and the vocabulary is cut into tiles too. None for what suits the device.
    Returns:
        a stream: [N], nats; float32 whatever the inputs (float64 for float64).
    Raises:
        ValueError: shapes, types or devices that do not belong together.
        IndexError: a target outside the vocabulary, on CPU; on a GPU its log-prob and gradient are NaN.
    """
    head = Head(weight_VD, bias, transform, chunk_bytes)
    return _head_output([hidden_ND, *others_ND], head, targets_N, with_statistics=False).logps


def token_logps_and_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    others_ND: Seq[Tensor] = (),
    bias: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    chunk_bytes: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[TokenStatistics, ...]]:
    """`token_logps`, and by the same sweep each stream's `TokenStatistics(entropy_N, is_top1_N)`; 0 where `IGNORED`."""
    head = Head(weight_VD, bias, transform, chunk_bytes)
    output = _head_output([hidden_ND, *others_ND], head, targets_N, with_statistics=True)
    return output.logps, output.statistics


def _head_output(hidden_states: Seq[Tensor], head: Head, targets_N: Tensor, *, with_statistics: bool) -> HeadOutput:
    """Of the rows that are asked for, spread over all rows again."""
    check_inputs(hidden_states, head, targets_N)
    asked_N = targets_N != IGNORED
    if not asked_N.all():
        (rows_M,) = asked_N.nonzero(as_tuple=True)
        asked = [hidden_ND.index_select(0, rows_M) for hidden_ND in hidden_states]
        return _spread(
            _head_output(asked, head, targets_N[rows_M], with_statistics=with_statistics), rows_M, len(targets_N)
        )
    if torch.is_grad_enabled() and head.is_trained:
        return differentiable_logps(hidden_states, head, targets_N, with_gradients=1, with_statistics=with_statistics)
    with_gradients = int(torch.is_grad_enabled() and hidden_states[0].requires_grad)
    output = logps_and_gradients(
        hidden_states, head, targets_N, with_gradients=with_gradients, with_statistics=with_statistics
    )
    return output._replace(logps=attached(hidden_states, output), gradients=())


def _spread(output: HeadOutput, rows_M: Tensor, num_tokens: int) -> HeadOutput:
    def spread(values_M: Tensor) -> Tensor:
        return values_M.new_zeros(num_tokens).index_copy(0, rows_M, values_M)

    statistics = tuple(TokenStatistics(*map(spread, of_stream)) for of_stream in output.statistics)
    return HeadOutput(tuple(map(spread, output.logps)), (), statistics)
