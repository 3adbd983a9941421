"""Whether the policy that answered is the policy that is trained: its log-probs of the answers against our own.

A server accepts wrong adapters and says nothing, so this is asked of every step. With the same weights the two differ
by rounding alone; the constants bound that. Measured with vLLM 0.32.0 on a 135M model against Hugging Face and PEFT:

                                   a token: mean (largest)     a response: mean (largest)      bound of a response
    float32                        2.2e-6   (2.7e-5)           8e-6    (3.7e-5)                1e-4 * sqrt(tokens)
    bfloat16, own in bfloat16      1.7e-2   (0.30)             0.048   (0.30), 6 tokens        0.5 * sqrt(tokens)
    bfloat16, own in float32       6.7e-3   (0.11)             0.021   (0.10), 6 tokens

and with wrong weights behind the name: 0.006 to 0.2 a token (missing layers, another scale, a cut matrix), 0.016 for
prefixes of an older version that were kept. In float32 the bound of a response sees all of these, from one response
on. In bfloat16 it sees the largest alone, because one response's rounding is as large as the fault.

So there is a second bound, on the mean over all tokens of a step. Rounding errors have both signs and cancel, as
1/sqrt(tokens of the step); a wrong policy's do not: answers are drawn from the policy that serves, so the mean of
(served - own) is an estimate of the divergence KL(served || own), which is above 0 unless the two are the same. The
mean is bounded on both sides, because an error need not come from sampling:

    |mean| <= floor + noise / sqrt(tokens)       float32: floor 1e-4, noise 1e-4     bfloat16: floor 0.01, noise 0.1

The noise of bfloat16 is five standard deviations of one token's error (0.02). The floor leaves room for what does not
cancel: the KL of rounding itself, half its variance, is 2e-4; others report 0.001 to 0.005 of larger models and of
mixtures of experts. A stale prefix at 0.016 a token is seen from some 280 tokens on; with fewer, or with faults that
change less than 0.01 nats a token, bfloat16 cannot tell. New names, paths and salts for each version make them
impossible where the server does what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uft_ds.errors import CheckFailed

RESPONSE_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Largest difference of a response, to be multiplied by the square root of its tokens."""
MEAN_FLOOR_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.01}
"""Largest mean difference of a token, over very many tokens."""
MEAN_NOISE_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""What is added to it, divided by the square root of the step's tokens."""


@dataclass(frozen=True)
class Gap:
    """How far the served log-probs are from our own.

    worst: of the response that is farthest for its length, |served - own|, nats.
    mean: served - own over all tokens, nats a token; with its sign.
    """

    worst: float
    mean: float


def check_served(own_R: Tensor, served_R: Tensor, tokens_R: Tensor, *, dtype: torch.dtype) -> Gap:
    """Refuse a step whose answers come from another policy than the one that is trained.

    Args:
        own_R: [responses], nats, sums over each response's tokens, by the trainer at the weights that were published,
            at temperature 1. served_R: the same by the server. tokens_R: [responses], tokens of each, at least 1.
        dtype: of the base's computation, the coarser one if the two differ.
    Raises:
        CheckFailed: a response, or the mean over the step, differs by more than rounding.
    """
    if len(own_R) == 0:
        return Gap(0.0, 0.0)
    own_R, served_R, tokens_R = (values_R.detach().cpu().double() for values_R in (own_R, served_R, tokens_R))
    difference_R = served_R - own_R
    shares_R = (difference_R.abs() / (RESPONSE_NATS[dtype] * tokens_R.sqrt())).nan_to_num(nan=math.inf)
    worst = int(shares_R.argmax())
    tokens = float(tokens_R.sum())
    gap = Gap(float(difference_R[worst].abs()), float(difference_R.sum()) / tokens)
    length = int(tokens_R[worst])
    bound = RESPONSE_NATS[dtype] * math.sqrt(length)
    bound_of_mean = MEAN_FLOOR_NATS[dtype] + MEAN_NOISE_NATS[dtype] / math.sqrt(tokens)
    of_worst = (
        f"response {worst} of {len(own_R)} has {float(served_R[worst]):.6g} nats served and {float(own_R[worst]):.6g} "
        f"own over {length} tokens"
    )
    # `not a <= b` for a NaN
    if not gap.worst <= bound:
        problem = f"{of_worst}: {gap.worst:.3g} apart, where rounding explains at most {bound:.3g}"
    elif not abs(gap.mean) <= bound_of_mean:
        problem = (
            f"served and own log-probs are {gap.mean:+.3g} nats a token apart in the mean of {tokens:.0f} tokens, "
            f"where rounding explains at most {bound_of_mean:.3g}; {of_worst}"
        )
    else:
        return gap
    raise CheckFailed(
        f"generator: {problem} ({str(dtype).removeprefix('torch.')}). The policy that answered is not the one that is "
        "trained. Usual causes: the server has another base model, or another dtype than the recipe; prefixes that it "
        "kept of an older version; another adapter behind the name, or none; several servers behind one address"
    )
