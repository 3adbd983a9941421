"""Likelihood losses: supervised fine-tuning, with no reference."""

from __future__ import annotations

from torch import Tensor

from uft_ds.data.example import GOOD_FROM, Response


def sequence_nll(logps_R: Tensor) -> Tensor:
    """-log pi(y|x) of each response, [responses], nats: UFT Eq. 1."""
    return -logps_R


def is_undesirable(response: Response) -> bool:
    """Whether a binary response was labelled bad."""
    return response.kind == "binary" and response.score < GOOD_FROM


def is_imitated(response: Response, *, is_rejected: bool) -> bool:
    """Whether a likelihood loss trains on the response: not if it is rejected in a pair or was labelled bad."""
    return not is_rejected and not is_undesirable(response)
