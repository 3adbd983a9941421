"""The tensors that one rank forwards at once: sequences packed into one row of tokens, without padding.

The row consists of segments. A segment is a whole sequence; or a prompt that several sequences share, which is then in
the row once; or what follows a shared prompt in one of them.

T packed tokens, N supervised tokens, R responses, S segments of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import SCORE, Response, Sequence
from uft_ds.data.prompts import by_prompt


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one rank forwards at once, as tensors.

    token_ids_T, position_ids_T: [tokens]; positions restart at 0 with each sequence, and go on after a shared prompt.
    predictors_N: [supervised tokens], index of the position whose output predicts the token. The last token of a shared
        prompt predicts the first token of several responses.
    targets_N: [supervised tokens], the token predicted.
    response_of_N: [supervised tokens], index into the responses.
    last_R: [responses], index of the position of each response's last token.
    host_predictors_N, host_last_R: the same two, which stay on the host: how many of them are in a part of the row
        cannot be asked of a GPU without waiting for it.
    facts: by name, [responses] each, float32: the score, and other facts that any of the responses carries.
    bounds_S: [segments + 1], int32, cumulative lengths.
    lengths: of each segment, in tokens.
    prompt_of: of each segment, the index of the segment with its prompt, to which its tokens attend too; None for a
        whole sequence and for a shared prompt itself.
    responses: in the order of the sequences, for kinds and origins; empty in the dummy micro-batch of a rank that has
        no sequences left.
    response_keys: the content hash of each response, as in `Sequence`.
    pairs: indices of the chosen and the rejected response of each pair.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    response_of_N: Tensor
    last_R: Tensor
    host_predictors_N: np.ndarray
    host_last_R: np.ndarray
    facts: Mapping[str, Tensor]
    bounds_S: Tensor
    lengths: tuple[int, ...]
    prompt_of: tuple[int | None, ...]
    responses: tuple[Response, ...]
    response_keys: tuple[bytes, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def num_responses(self) -> int:
        return len(self.responses)

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt of several sequences is in the row once."""
        return any(prompt is not None for prompt in self.prompt_of)

    @property
    def longest(self) -> int:
        """Length of the longest segment, in tokens."""
        return max(self.lengths)

    @property
    def scores_R(self) -> Tensor:
        """[responses], float32."""
        return self.facts[SCORE]

    def fact(self, name: str) -> Tensor:
        """One fact of each response: [responses], float32; NaN for a response that does not carry it.

        Rows of files carry the score alone. Other facts (`Response.other_facts`) are for steps that are made while
        training, such as an advantage of rollouts, which a `StepSource` of another package may give.
        """
        return self.facts[name] if name in self.facts else torch.full_like(self.scores_R, math.nan)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        moved["facts"] = {name: column.to(device, non_blocking=True) for name, column in self.facts.items()}
        return replace(self, **moved)


# Two tokens and no response. Every rank must run the same number of forwards, or ZeRO's gathers hang.
_DUMMY = Sequence(np.zeros(2, dtype=np.int32), ())


def micro_batch(sequences: Seq[Sequence], *, share_prompts: bool = False) -> MicroBatch:
    """Pack sequences into one micro-batch; without sequences, the dummy micro-batch.

    Args:
        share_prompts: whether a prompt that several sequences begin with is in the row once. Only an attention that
            reads `prompt_of` computes such a row.
    """
    sequences = sequences or [_DUMMY]
    row = _Row.of(sequences, by_prompt(sequences) if share_prompts else [[i] for i in range(len(sequences))])
    token_ids = row.of_tokens([s.token_ids_T for s in sequences]).astype(np.int64)
    responses = [(places, r) for places, s in zip(row.places, sequences, strict=True) for r in s.responses]
    # All tokens of all responses. A token is predicted by the output at the place of the token before it.
    spans = [places[r.start : r.end] for places, r in responses]
    predictors = [places[r.start - 1 : r.end - 1] for places, r in responses]
    supervised = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
    predictors_N = np.concatenate(predictors) if predictors else supervised
    last_R = np.array([span[-1] for span in spans], dtype=np.int64)
    lengths = torch.tensor([len(span) for span in spans], dtype=torch.int64)
    return MicroBatch(
        token_ids_T=torch.from_numpy(token_ids),
        position_ids_T=torch.from_numpy(row.of_tokens([np.arange(s.num_tokens) for s in sequences])),
        predictors_N=torch.from_numpy(predictors_N),
        targets_N=torch.from_numpy(token_ids[supervised]),
        response_of_N=torch.repeat_interleave(torch.arange(len(spans)), lengths),
        last_R=torch.from_numpy(last_R),
        host_predictors_N=predictors_N,
        host_last_R=last_R,
        facts=_columns([r for _, r in responses]),
        bounds_S=torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32),
        lengths=row.lengths,
        prompt_of=row.prompt_of,
        responses=tuple(r for _, r in responses),
        response_keys=tuple(key for s in sequences for key in s.response_keys),
        pairs=_pairs([r for _, r in responses]),
    )


@dataclass(frozen=True)
class _Row:
    """Where the tokens of sequences are in a row.

    lengths, prompt_of: as in `MicroBatch`.
    places: for each sequence, the index in the row of each of its tokens: [tokens of the sequence], int64.
    """

    lengths: tuple[int, ...]
    prompt_of: tuple[int | None, ...]
    places: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, sequences: Seq[Sequence], groups: Seq[Seq[int]]) -> _Row:
        """The row of groups of sequences that share a prompt, given by their indices; a group of one shares nothing."""
        lengths: list[int] = []
        prompt_of: list[int | None] = []
        places: dict[int, np.ndarray] = {}
        end = 0

        def append(length: int, prompt: int | None) -> np.ndarray:
            nonlocal end
            lengths.append(length)
            prompt_of.append(prompt)
            end += length
            return np.arange(end - length, end)

        for members in groups:
            shared = sequences[members[0]].prompt_tokens if len(members) > 1 else 0
            prompt = append(shared, None) if shared else np.arange(0)
            number = len(lengths) - 1 if shared else None
            for i in members:
                places[i] = np.concatenate([prompt, append(sequences[i].num_tokens - shared, number)])
        return cls(tuple(lengths), tuple(prompt_of), tuple(places[i] for i in range(len(sequences))))

    def of_tokens(self, values: Seq[np.ndarray]) -> np.ndarray:
        """[tokens of the row]: values of each sequence's tokens at their places; those of a shared prompt are equal."""
        row = np.zeros(sum(self.lengths), dtype=np.int64)
        for places, of_sequence in zip(self.places, values, strict=True):
            row[places] = of_sequence
        return row


def _columns(responses: Seq[Response]) -> dict[str, Tensor]:
    """Facts by name: [responses] each, float32; NaN for a response that does not carry the fact."""
    facts = [response.facts for response in responses]
    names = dict.fromkeys((SCORE, *(name for of in facts for name in of)))
    return {name: torch.tensor([of.get(name, math.nan) for of in facts], dtype=torch.float32) for name in names}


def _pairs(responses: Seq[Response]) -> tuple[tuple[int, int], ...]:
    """Indices of the two sides of each pair. A single side, forwarded only for its log-prob, is not a pair."""
    places: dict[int, list[int]] = {}
    for place, response in enumerate(responses):
        if response.pair_id is not None:
            places.setdefault(response.pair_id, []).append(place)
    assert all(len(sides) <= 2 for sides in places.values()), "a pair_id names one pair of a step"
    return tuple((sides[0], sides[1]) for sides in places.values() if len(sides) == 2)
