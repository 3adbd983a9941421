"""The implicit reward, from token log-probs to one log-ratio a response.

N supervised tokens, R responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch


def response_logps(token_logps_N: Tensor, response_of_N: Tensor, num_responses: int) -> Tensor:
    """log pi(y|x): the sum over each response's tokens (UFT Eq. 1), [responses], nats, float64.

    float64, because a log-ratio is a small difference of two large sums: in float32 it would be off by 1e-3 nats at
    2,000 tokens.
    """
    zeros_R = torch.zeros(num_responses, dtype=torch.float64, device=token_logps_N.device)
    return zeros_R.index_add(0, response_of_N, token_logps_N.double())


def response_sums(of_N: Tensor, micro_batch: MicroBatch) -> Tensor:
    """`response_logps` of anything that each supervised token has."""
    return response_logps(of_N, micro_batch.response_of_N, micro_batch.num_responses)


def implicit_reward(log_ratios_R: Tensor, beta: Tensor | float) -> Tensor:
    """r = beta (log pi(y|x) - log pi_ref(y|x)), UFT (arXiv 2410.21438) Eq. 5; beta one for all, or [responses]."""
    return beta * log_ratios_R


def implicit_score(rewards_R: Tensor) -> Tensor:
    """sigmoid(r - shift), in [0, 1]: what is compared with the given score (UNA, arXiv 2408.15339 Eq. 8)."""
    return torch.sigmoid(rewards_R)
