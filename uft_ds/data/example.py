"""The values that pass through the data pipeline.

    source row -> Example or Pair -> Sequence -> Step -> MicroBatch

Each value is immutable and knows nothing about the stages after it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["instruction", "score", "binary", "pair"]
KINDS: tuple[Kind, ...] = ("instruction", "score", "binary", "pair")

GOOD_FROM = 0.5
"""A response with at least this score counts as good."""

KEY_BYTES = 16
"""Size of a response key, the hash that names a response by its content."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. An assistant turn with a score is supervised; without one it is context.

    tool_calls: of an assistant turn, as the chat template takes them (OpenAI's layout).
    extras: other fields that a chat template may use, by name: reasoning_content, name, tool_call_id.
    marked_as_context: whether the data says that this turn is not to be learned.
    """

    role: Role
    content: str
    score: float | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    extras: tuple[tuple[str, str], ...] = ()
    marked_as_context: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Exact:
    """The tokens of a conversation's prompt and of its last turn, for data that says how it was sampled.

    tokenizer: the hash of the tokenizer and chat template that they are of; see `ChatTokenizer.content_hash`.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    tokenizer: str


@dataclass(frozen=True)
class Example:
    """An item of a data set: a conversation with one or more supervised assistant turns.

    A single (prompt, response, score) is a conversation whose last turn alone carries a score.

    tools: JSON schemas of the tools that the conversation may call.
    exact: its tokens, if they are given; then the chat template is not asked, and the last turn may be empty.
    """

    messages: tuple[Message, ...]
    kind: Kind
    tools: tuple[Mapping[str, Any], ...] = ()
    exact: Exact | None = None

    @property
    def num_responses(self) -> int:
        """The number of supervised turns."""
        return sum(message.score is not None for message in self.messages)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first. Each side is a conversation with a score on its last turn alone.

    scored: whether the scores come from the data. If not, they are 1 and 0 and only say which side is better.
    """

    chosen: Example
    rejected: Example
    scored: bool = False

    @property
    def is_tie(self) -> bool:
        """Whether neither is better: two scored responses, but no preference."""
        return self.chosen.messages[-1].score == self.rejected.messages[-1].score

    @property
    def num_responses(self) -> int:
        return 2


SCORE = "score"
"""Name of the fact (a number about a response) that every response has."""

ONLINE = "online"
"""Name of the fact, 1.0, of a response that the policy of the same step gave; responses of data do not have it."""

SERVED = "served_logp"
"""Name of the fact, in nats, that says which log-prob the generator gave to a response, summed over its tokens."""


@dataclass(frozen=True)
class Response:
    """A supervised span of a sequence: tokens [start, end), the end-of-turn token included.

    `start` is at least 1, because the token before the span predicts its first token.

    score: in [0, 1].
    origin: `file:line` (or `name:row`), for messages to the user; filled in by the store.
    pair_id: shared by the two sides of a pair and unique within a step; the chosen side comes first.
    other_facts: numbers by name that an objective may read besides the score, such as an advantage.
    Raises:
        ValueError: `other_facts` contains the score again.
    """

    start: int
    end: int
    score: float
    kind: Kind
    origin: str = ""
    pair_id: int | None = None
    other_facts: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if SCORE in self.other_facts:
            raise ValueError(f"a response's {SCORE} is given twice: {self.score} and {self.other_facts[SCORE]}")

    @property
    def facts(self) -> Mapping[str, float]:
        """All numbers that this response carries, by name: the score first."""
        return {SCORE: self.score, **self.other_facts}

    @property
    def is_online(self) -> bool:
        """Whether the policy of the same step gave this response."""
        return self.other_facts.get(ONLINE) == 1.0

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Sequence:
    """One run of tokens with its responses, in order and disjoint.

    token_ids_T: [tokens], int32.
    stored_keys: `response_keys`, if they have been computed before.
    """

    token_ids_T: np.ndarray
    responses: tuple[Response, ...]
    stored_keys: tuple[bytes, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def pair_id(self) -> int | None:
        """The id of its pair; None if it is not a side of one."""
        return self.responses[0].pair_id if self.responses else None

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens before its first response; without a response, all."""
        return self.responses[0].start if self.responses else self.num_tokens

    @cached_property
    def response_keys(self) -> tuple[bytes, ...]:
        """A hash of each response's content: the tokens up to its end, its start and its end.

        In a causal model a response's log-prob depends on nothing else: not on later tokens, and not on the other
        sequences of the micro-batch.
        """
        if self.stored_keys is not None:
            return self.stored_keys
        tokens = self.token_ids_T.astype("<i4", copy=False)  # one byte order, so that keys are the same everywhere
        digest, hashed, keys = blake2b(digest_size=KEY_BYTES), 0, []
        for response in self.responses:
            digest.update(tokens[hashed : response.end].tobytes())
            hashed = response.end
            own = digest.copy()
            own.update(struct.pack("<2q", response.start, response.end))
            keys.append(own.digest())
        return tuple(keys)


Unit = tuple[Sequence, ...]
"""One sequence, or the two of a pair with the chosen one first; never divided over micro-batches."""


def keep_first(sequence: Sequence, num_responses: int) -> Sequence:
    """The sequence up to the end of its `num_responses`-th response; later tokens cannot influence earlier ones."""
    responses = sequence.responses[:num_responses]
    keys = sequence.stored_keys
    return Sequence(
        sequence.token_ids_T[: responses[-1].end if responses else 0],
        responses,
        None if keys is None else keys[:num_responses],
    )
