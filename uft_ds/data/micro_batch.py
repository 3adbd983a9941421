"""The tensors that one rank forwards at once: sequences packed into one row of tokens, without padding.

T packed tokens, N supervised tokens, R responses, S sequences of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import SCORE, Response, Sequence


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one rank forwards at once, as tensors.

    token_ids_T, position_ids_T: [tokens]; positions restart at 0 with each sequence.
    predictors_N: [supervised tokens], index of the position whose output predicts the token.
    targets_N: [supervised tokens], the token predicted.
    response_of_N: [supervised tokens], index into the responses.
    last_R: [responses], index of the position of each response's last token.
    facts: by name, [responses] each, float32: the score, and other facts that any of the responses carries.
    bounds_S: [sequences + 1], int32, cumulative lengths.
    lengths: of each sequence, in tokens.
    responses: for kinds and origins; empty in the dummy micro-batch of a rank that has no sequences left.
    response_keys: the content hash of each response, as in `Sequence`.
    pairs: indices of the chosen and the rejected response of each pair.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    response_of_N: Tensor
    last_R: Tensor
    facts: Mapping[str, Tensor]
    bounds_S: Tensor
    lengths: tuple[int, ...]
    responses: tuple[Response, ...]
    response_keys: tuple[bytes, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def num_responses(self) -> int:
        return len(self.responses)

    @property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens."""
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


def micro_batch(sequences: Seq[Sequence]) -> MicroBatch:
    """Pack sequences into one micro-batch; without sequences, the dummy micro-batch."""
    sequences = sequences or [_DUMMY]
    offsets = np.cumsum([0, *(s.num_tokens for s in sequences)])
    token_ids = np.concatenate([s.token_ids_T for s in sequences]).astype(np.int64)
    positions = np.concatenate([np.arange(s.num_tokens) for s in sequences])
    responses = [(offset, r) for offset, s in zip(offsets, sequences, strict=False) for r in s.responses]
    spans = [np.arange(offset + r.start, offset + r.end) for offset, r in responses]
    # All tokens of all responses. The token at position p is predicted by the output at p - 1.
    supervised = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
    lengths = [len(span) for span in spans]
    return MicroBatch(
        token_ids_T=torch.from_numpy(token_ids),
        position_ids_T=torch.from_numpy(positions),
        predictors_N=torch.from_numpy(supervised - 1),
        targets_N=torch.from_numpy(token_ids[supervised]),
        response_of_N=torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths, dtype=torch.int64)),
        last_R=torch.tensor([offset + r.end - 1 for offset, r in responses], dtype=torch.int64),
        facts=_columns([r for _, r in responses]),
        bounds_S=torch.from_numpy(offsets.astype(np.int32)),
        lengths=tuple(s.num_tokens for s in sequences),
        responses=tuple(r for _, r in responses),
        response_keys=tuple(key for s in sequences for key in s.response_keys),
        pairs=_pairs([r for _, r in responses]),
    )


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
