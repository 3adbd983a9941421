"""Likelihood losses: supervised fine-tuning, with no reference."""

from __future__ import annotations

from torch import Tensor


def sequence_nll(logps_R: Tensor) -> Tensor:
    """-log pi(y|x) of each response, [responses], nats: UFT Eq. 1. Divided by the step's tokens: the token mean."""
    return -logps_R
