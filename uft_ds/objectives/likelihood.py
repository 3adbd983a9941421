"""Likelihood losses: supervised fine-tuning, with no reference."""

from __future__ import annotations

from torch import Tensor


def token_nll(token_logps_N: Tensor) -> Tensor:
    """-log pi(y_t | x, y_<t), one value per supervised token, nats."""
    return -token_logps_N
