"""Per-token log-probs of one or more streams from hidden states, without ever holding all logits.

N tokens, D hidden size, V vocabulary. The modules of this package, from the outside in:

    token_logps                    the function for use without a model, and for measurements; a model's head calls
                                   frozen_head or trainable_head itself
    frozen_head, trainable_head    the link of log-probs to their inputs in autograd's graph
    forward                        all tokens, chunk by chunk
    chunks, tiles                  one chunk over the vocabulary, tile by tile; the sizes of both
    rows                           one tile of logits: its running sums
    sweeps                         which implementation sweeps over a tile: rows_torch or rows_triton
    logits, naive                  scaling and exact matmuls; the plain definition
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import check_inputs
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.kernels.trainable_head import differentiable_logps

IGNORED = -100
"""The target of a token whose log-prob is not computed, as in torch's cross_entropy."""


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
    """`naive_token_logps` of several streams with one matmul per chunk: the first with gradient, the others without.

    Gradients flow to `hidden_ND`, and to `weight_VD` and `bias` if these require them; a head is frozen if it requires
    no gradient. Only first derivatives are supported. All inputs are on one device and have one dtype, except `bias`.
    Equal rows of two streams give equal bits.

    Args:
        targets_N: token ids, int64. A row with `IGNORED` is not computed; its log-prob and gradient are 0. (On a GPU
            the search for such rows waits for the device. `logps_and_gradients` and `attached` take no such rows and do
            not wait.)
        others_ND: hidden states of further streams, [N, D] each, without gradient.
        bias: [V].
        transform: the model's scaling and capping of logits.
        chunk_bytes: memory for logits. If it suffices for some hundred rows of the whole vocabulary, tiles are whole
            rows; else the vocabulary is cut too. None: a default for the device.
    Returns:
        for each stream [N], nats, float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, dtypes or devices do not match.
        IndexError: a target is outside the vocabulary, on a CPU. On a GPU its log-prob and gradient are NaN.
    """
    head = Head(weight_VD, bias, transform, chunk_bytes)
    return _logps([hidden_ND, *others_ND], head, targets_N)


def _logps(hidden_states: Seq[Tensor], head: Head, targets_N: Tensor) -> tuple[Tensor, ...]:
    """Rows that are not `IGNORED` are computed, the others are 0."""
    check_inputs(hidden_states, head, targets_N)
    asked_N = targets_N != IGNORED
    if not asked_N.all():
        (rows_M,) = asked_N.nonzero(as_tuple=True)
        asked = [hidden_ND.index_select(0, rows_M) for hidden_ND in hidden_states]
        logps = _logps(asked, head, targets_N[rows_M])
        return tuple(logps_M.new_zeros(len(targets_N)).index_copy(0, rows_M, logps_M) for logps_M in logps)
    if torch.is_grad_enabled() and head.is_trained:
        return differentiable_logps(hidden_states, head, targets_N, with_gradients=1).logps
    with_gradients = int(torch.is_grad_enabled() and hidden_states[0].requires_grad)
    output = logps_and_gradients(hidden_states, head, targets_N, with_gradients=with_gradients)
    return attached(hidden_states, output)
