"""Tokens drawn by seeds of their own, so that an answer does not depend on what is answered beside it.

B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from uft_ds.evaluation.generate import LEAST_TEMPERATURE


class Draw(LogitsProcessor):
    """Makes greedy selection a draw from softmax(logits / temperature), cut to `top_p`: the Gumbel-max trick.

        argmax(logits / temperature - log E),  E ~ Exp(1) for each token of the vocabulary

    Each row has a generator of its own, on the model's device, and takes V numbers for each token. So the tokens of an
    answer follow from the logits and the row's seed alone; torch's global generators are not used. The same seed gives
    other numbers on a CPU than on a GPU.

    At a temperature below `LEAST_TEMPERATURE` the likeliest token is taken, and nothing is drawn.
    """

    def __init__(self, seeds: Seq[int], *, temperature: float, top_p: float, device: torch.device) -> None:
        self._generators = []
        self._warpers: list[LogitsProcessor] = []
        if temperature >= LEAST_TEMPERATURE:
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(top_p))
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which the largest one is the token that is drawn: [B, V], float32."""
        self._is_finite &= scores.amax(-1).isfinite().all()  # a NaN is the largest of any row
        if not self._generators:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise_BV = torch.empty_like(scores)
        for noise_V, generator in zip(noise_BV, self._generators, strict=True):
            noise_V.exponential_(generator=generator)
        # A 0 would be infinite noise, and its sum with a token that is cut no number. It stands for all below 2^-24.
        return scores - noise_BV.clamp_min_(2.0**-25).log_()

    def keep(self, rows: Seq[int]) -> None:
        """Go on with these rows of the batch alone."""
        if self._generators:
            self._generators = [self._generators[row] for row in rows]

    @property
    def is_finite(self) -> bool:
        """Whether the largest logit of each row so far was a finite number; if not, no token means anything.

        Waits for the device.
        """
        return bool(self._is_finite)
