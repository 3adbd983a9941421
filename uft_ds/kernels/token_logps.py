"""Per-token log-probabilities of policy and reference from hidden states, without ever holding all logits.

N tokens, D hidden size, V vocabulary. The modules, from the outside in:

    token_logps                    the functions to call
    frozen_head, trainable_head    how log-probs are linked to what they were computed from
    forward                        all tokens: chunk after chunk
    chunks, tiles                  one chunk: over the vocabulary, tile after tile; how large they are
    rows, rows_torch, rows_triton  one tile of logits: what is kept of it; the two implementations of the sweep
    logits, naive                  scaling and exact matmuls; the definition
"""

from __future__ import annotations

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput, TokenStatistics, check_inputs
from uft_ds.kernels.frozen_head import attach, logps_and_gradients
from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.trainable_head import differentiable_logps

IGNORED = -100
"""The target of a token whose log-prob is not asked for, as in torch's cross_entropy."""


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`naive_token_logps` for the policy, with gradient, and for the reference, without.

    Gradients flow to `hidden_ND`, and to `weight_VD` and `bias` where they require them: a frozen head is one that
    does not require a gradient. First derivatives only. All inputs have one dtype (but for `bias`) and one device.

    Args:
        targets_N: token ids, int64; a row with `IGNORED` is not computed: its log-prob and gradient are 0. (To find
            such rows a GPU is waited for; not by `logps_and_gradients` and `attach`, which take asked rows only.)
        bias: [V]. softcap, scale, temperature: see `LogitTransform`.
        chunk_bytes: memory for logits. Enough of it for some hundred rows of the whole vocabulary, and whole rows are
            taken; less, and the vocabulary is cut into tiles too. None for what suits the device.
    Returns:
        policy and reference log-probs, [N] each, nats; float32 whatever the inputs (float64 for float64).
    Raises:
        ValueError: shapes, types or devices that do not belong together, or a factor that makes no sense.
        IndexError: a target outside the vocabulary, on CPU; on a GPU its log-prob and gradient are NaN.
    """
    output = _head_output(
        hidden_ND,
        weight_VD,
        targets_N,
        reference_hidden_ND,
        bias,
        LogitTransform.of(softcap=softcap, scale=scale, temperature=temperature),
        with_statistics=False,
        chunk_bytes=chunk_bytes,
    )
    return output.logps_N, output.reference_logps_N


def token_logps_and_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None, TokenStatistics]:
    """`token_logps`, and by the same sweep `TokenStatistics(entropy_N, is_top1_N)` of the policy; 0 where `IGNORED`."""
    output = _head_output(
        hidden_ND,
        weight_VD,
        targets_N,
        reference_hidden_ND,
        bias,
        LogitTransform.of(softcap=softcap, scale=scale, temperature=temperature),
        with_statistics=True,
        chunk_bytes=chunk_bytes,
    )
    assert output.statistics is not None
    return output.logps_N, output.reference_logps_N, output.statistics


def _head_output(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    reference_hidden_ND: Tensor | None,
    bias_V: Tensor | None,
    transform: LogitTransform,
    *,
    with_statistics: bool,
    chunk_bytes: int | None,
) -> HeadOutput:
    """Of the rows that are asked for, spread over all rows again."""
    check_inputs(hidden_ND, Head(weight_VD, bias_V, transform), targets_N, reference_hidden_ND, chunk_bytes)
    asked_N = targets_N != IGNORED
    if not asked_N.all():
        (rows_M,) = asked_N.nonzero(as_tuple=True)
        output = _head_output(
            hidden_ND.index_select(0, rows_M),
            weight_VD,
            targets_N[rows_M],
            None if reference_hidden_ND is None else reference_hidden_ND.index_select(0, rows_M),
            bias_V,
            transform,
            with_statistics=with_statistics,
            chunk_bytes=chunk_bytes,
        )
        return _spread(output, rows_M, len(targets_N))
    trains_head = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if torch.is_grad_enabled() and trains_head:
        return differentiable_logps(
            hidden_ND,
            weight_VD,
            targets_N,
            reference_hidden_ND=reference_hidden_ND,
            bias_V=bias_V,
            transform=transform,
            with_statistics=with_statistics,
            chunk_bytes=chunk_bytes,
        )
    output = logps_and_gradients(
        hidden_ND,
        weight_VD,
        targets_N,
        reference_hidden_ND=reference_hidden_ND,
        bias_V=bias_V,
        transform=transform,
        with_gradients=torch.is_grad_enabled() and hidden_ND.requires_grad,
        with_statistics=with_statistics,
        chunk_bytes=chunk_bytes,
    )
    if output.gradients_ND is None:
        return output
    return output._replace(logps_N=attach(hidden_ND, output.logps_N, output.gradients_ND), gradients_ND=None)


def _spread(output: HeadOutput, rows_M: Tensor, num_tokens: int) -> HeadOutput:
    def spread(values_M: Tensor) -> Tensor:
        return values_M.new_zeros(num_tokens).index_copy(0, rows_M, values_M)

    logps_N, _, reference_logps_N, statistics = output
    return HeadOutput(
        spread(logps_N),
        None,
        None if reference_logps_N is None else spread(reference_logps_N),
        None if statistics is None else TokenStatistics(*map(spread, statistics)),
    )
