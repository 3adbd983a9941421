"""What a step's forward found of the answers that its own policy has given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OwnAnswers:
    """Of all answers of a step; the same on every rank.

    policy_R, reference_R, served_R: [answers], log-probs summed over tokens, nats, by the policy, the reference and the
    generator; NaN where no loss needed the reference, or the generator did not say. tokens_R: tokens of each.
    """

    policy_R: np.ndarray
    reference_R: np.ndarray
    served_R: np.ndarray
    tokens_R: np.ndarray
