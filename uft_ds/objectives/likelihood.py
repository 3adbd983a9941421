"""Likelihood losses: supervised fine-tuning, with no reference."""

from __future__ import annotations

from torch import Tensor

from uft_ds.data.example import GOOD_FROM, Response


def sequence_nll(logps_R: Tensor) -> Tensor:
    """-log pi(y|x) of each response, [responses], nats: UFT Eq. 1."""
    return -logps_R


def is_undesirable(response: Response) -> bool:
    """Whether it was labelled bad."""
    return response.kind == "binary" and response.score < GOOD_FROM


def is_imitated(response: Response, *, is_rejected: bool) -> bool:
    """Whether a likelihood loss takes it: never the rejected side of a pair, nor what was labelled bad."""
    return not is_rejected and not is_undesirable(response)
