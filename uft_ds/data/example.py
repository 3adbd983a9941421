"""The values that pass through the data pipeline.

    source row -> Example -> Sequence -> Step -> MicroBatch

Each is immutable and knows nothing about the stage after it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Literal

import numpy as np

Role = Literal["system", "user", "assistant"]
Kind = Literal["instruction", "score", "binary", "pair"]
KINDS: tuple[Kind, ...] = ("instruction", "score", "binary", "pair")

KEY_BYTES = 16
"""Of the name by which a response is known by its content."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. An assistant turn with a score is supervised; without one it is context."""

    role: Role
    content: str
    score: float | None = None


@dataclass(frozen=True)
class Example:
    """What a data set gives: a conversation with one or more supervised assistant turns.

    A single (prompt, response, score) is a conversation whose last turn alone carries a score.
    """

    messages: tuple[Message, ...]
    kind: Kind
    origin: str
    """`file:line` (or `name:row`), for messages to the user."""


@dataclass(frozen=True)
class Response:
    """A supervised span of a sequence: tokens [start, end), the end-of-turn token included.

    `start` is at least 1: the token before predicts the span's first token.
    """

    start: int
    end: int
    score: float
    kind: Kind
    origin: str

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Sequence:
    """One run of tokens with its responses, in order and disjoint.

    token_ids_T: [tokens], int32.
    """

    token_ids_T: np.ndarray
    responses: tuple[Response, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @cached_property
    def response_keys(self) -> tuple[bytes, ...]:
        """Each response named by its content: the tokens up to its end, and where it starts.

        In a causal model a response's log-prob depends on nothing else, whatever follows it or stands beside it.
        """
        tokens = self.token_ids_T.astype("<i4", copy=False)
        digest, hashed, keys = blake2b(digest_size=KEY_BYTES), 0, []
        for response in self.responses:
            digest.update(tokens[hashed : response.end].tobytes())
            hashed = response.end
            own = digest.copy()
            own.update(struct.pack("<2q", response.start, response.end))
            keys.append(own.digest())
        return tuple(keys)
