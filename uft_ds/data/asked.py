"""Prompts as the mixture draws them: each counts as the responses that the policy will give to it.

Planning, packing and the checks before the first step see stand-ins of the longest answers; `rollouts/` replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uft_ds.data.example import KEY_BYTES, Response, Sequence, Unit
from uft_ds.data.mixture import Portion
from uft_ds.data.sources import PreparedSource
from uft_ds.data.store.selection import Selection


@dataclass(frozen=True)
class Asked:
    """A pool whose units are prompts, each with stand-ins of its answers.

    answers: how often each prompt is asked. answer_tokens: of the longest answer, the end-of-turn token included.
    """

    selection: Selection
    answers: int
    answer_tokens: int

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def responses_U(self) -> np.ndarray:
        """[prompts], int64: how many responses each gets."""
        return np.full(len(self), self.answers, dtype=np.int64)

    def prompt(self, index: int) -> Sequence:
        """The tokens of one prompt, up to where its answer begins, without a response."""
        (sequence,) = self.selection.unit(index)
        return Sequence(sequence.token_ids_T[: sequence.prompt_tokens], ())

    def origin(self, index: int) -> str:
        """The place that a prompt came from."""
        return self.selection.store.origin(int(self.selection.units_U[index]))

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        """The prompt with stand-ins of its answers, as long as they may be."""
        prompt_ids_T = self.prompt(index).token_ids_T
        stand_in_T = np.resize(prompt_ids_T, self.answer_tokens)
        start = len(prompt_ids_T)
        response = Response(start, start + self.answer_tokens, 0.5, "score", self.origin(index))
        sequence = Sequence(np.concatenate([prompt_ids_T, stand_in_T]), (response,))
        return (sequence,) * self.answers

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        """The keys of the stand-ins."""
        return tuple(key for sequence in self.unit(index) for key in sequence.response_keys)

    @property
    def keys_R(self) -> np.ndarray:
        """[0]: no response is known before it is generated."""
        return np.zeros(0, dtype=f"S{KEY_BYTES}")


@dataclass(frozen=True)
class AskedSource:
    """An online source as the mixture draws from it; see `data.mixture.MixedSource`."""

    seed_name: str
    selection: Asked
    portion: Portion

    @classmethod
    def of(cls, source: PreparedSource) -> AskedSource:
        """The source, which must be an online one."""
        asked = source.settings.asked
        assert asked is not None, f"{source.label} is not an online source"
        return cls(source.seed_name, Asked(source.selection, asked.answers, asked.answer_tokens), source.portion)
