"""Map the scores that a source gives to the scores that are trained on (the recipe's `score_map`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """A table from given scores to mapped scores: [distinct scores] each, float64, `given_V` in ascending order."""

    given_V: np.ndarray
    mapped_V: np.ndarray

    def __call__(self, score: float) -> float:
        """The mapped score of a score that the source gave."""
        return float(self.mapped_V[np.searchsorted(self.given_V, score)])


def affine(scores_R: np.ndarray, scale: float, offset: float) -> ScoreMap:
    """The map scale * score + offset.

    Raises:
        ValueError: a mapped score would be outside [0, 1] (nothing is clipped), or the order would not be kept.
    """
    if not scale > 0:
        raise ValueError(f"[{scale:g}, {offset:g}] does not keep the order of the scores; expected a scale above 0")
    given_V = np.unique(scores_R)
    # Rounding may overstep the ends: 0.7 * 1 + 0.3 is above 1 for some pairs of floats.
    mapped_V = np.round(scale * given_V + offset, 12)
    outside = (mapped_V < 0) | (mapped_V > 1)
    if outside.any():
        worst = int(np.argmax(np.abs(mapped_V - 0.5)))
        raise ValueError(
            f"[{scale:g}, {offset:g}] makes {mapped_V[worst]:g} of score {given_V[worst]:g}; expected 0 to 1 for all "
            f"scores from {given_V[0]:g} to {given_V[-1]:g}"
        )
    return ScoreMap(given_V, mapped_V)


def quantiles(scores_R: np.ndarray) -> ScoreMap:
    """Map each score to the share of the source's responses with a lower score; equal scores count half.

    The mean of the mapped scores is always 0.5, which stands for no preference.
    """
    given_V, counts_V = np.unique(scores_R, return_counts=True)
    return ScoreMap(given_V, (np.cumsum(counts_V) - counts_V / 2) / len(scores_R))
