"""Pointwise losses, which compare the implicit reward of one response with its given score."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from uft_ds.objectives.implicit_reward import implicit_score
from uft_ds.objectives.losses import Distance


def pointwise_loss(rewards_R: Tensor, scores_R: Tensor, distance: Distance) -> Tensor:
    """Distance between the implicit and the given score, one value per response.

        mse: (sigmoid(r) - s)^2         UFT (arXiv 2410.21438) Eq. 7 for s = 1; UNA (2408.15339) Eq. 11, 13
        bce: -s log sigmoid(r) - (1 - s) log sigmoid(-r)
                                        UNA Eq. 12, with soft labels; BCO (2404.04656) with a running shift
        l1:  |sigmoid(r) - s|           with binary labels: APO-zero (2408.06266); with the kl shift: KTO (2402.01306)
        raw: (r - (s - 1/2))^2          without a sigmoid; with binary labels: beta^2 times SPPO's loss (2405.00675)

    Args:
        rewards_R: [responses], r = beta * log_ratio - shift. Carries the gradient.
        scores_R: [responses], in [0, 1]; for mse, l1 and raw also a target outside: see `center` in docs/objectives.md.
    Returns:
        [responses], float32; finite for any reward up to 1e19.
    """
    if distance == "bce":
        # From the reward itself: the logarithm of a rounded sigmoid would be infinite for large rewards.
        return F.binary_cross_entropy_with_logits(rewards_R, scores_R, reduction="none")
    if distance == "raw":
        return (rewards_R - (scores_R - 0.5)).square()
    error_R = implicit_score(rewards_R) - scores_R
    return error_R.square() if distance == "mse" else error_R.abs()
