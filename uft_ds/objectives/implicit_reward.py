"""From token log-probs to the log-prob, implicit reward and implicit score of each response.

N supervised tokens, R responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch


def response_logps(token_logps_N: Tensor, response_of_N: Tensor, num_responses: int) -> Tensor:
    """log pi(y|x): the sum over each response's tokens (UFT Eq. 1), [responses], nats, float64.

    float64 is used because a log-ratio is a small difference of two large sums: in float32 its error would be 1e-3 nats
    at 2,000 tokens.

    Args:
        response_of_N: the index of each token's response.
    """
    zeros_R = torch.zeros(num_responses, dtype=torch.float64, device=token_logps_N.device)
    return zeros_R.index_add(0, response_of_N, token_logps_N.double())


def response_sums(of_N: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Sums over each response's tokens of any value per supervised token: [responses], float64."""
    return response_logps(of_N, micro_batch.response_of_N, micro_batch.num_responses)


def implicit_reward(log_ratios_R: Tensor, beta: Tensor | float) -> Tensor:
    """r = beta (log pi(y|x) - log pi_ref(y|x)), UFT (arXiv 2410.21438) Eq. 5; beta is one number or [responses]."""
    return beta * log_ratios_R


def implicit_score(rewards_R: Tensor) -> Tensor:
    """The implicit score, in [0, 1], which is compared with the given score (UNA, arXiv 2408.15339 Eq. 8).

    It is sigmoid(r - shift); `rewards_R` must have the shift subtracted already.
    """
    return torch.sigmoid(rewards_R)
