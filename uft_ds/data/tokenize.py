"""Examples to sequences: the tokenizer's chat template, with exact spans of the supervised tokens.

The prompt of every response is tokenised just as it is at generation, so a response's log-probability is that
of the tokens the model would have to produce after that very prompt, the end-of-turn token included.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from uft_ds.data.chat_template import end_of_turn_id, render, special_tokens
from uft_ds.data.example import Example, Message, Response, Sequence
from uft_ds.errors import UserError


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template that is known to close the assistant's turn with one token."""

    tokenizer: Any
    end_of_turn_id: int
    control_tokens: tuple[str, ...]

    def render(self, messages: Seq[Message], *, for_generation: bool = False) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return render(self.tokenizer, turns, add_generation_prompt=for_generation)

    def encode(self, text: str) -> list[int]:
        # The template has written every special token already: adding them again would double the BOS.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Tokenized:
    """The sequences of one example, and how many of its responses were dropped for which reason."""

    sequences: tuple[Sequence, ...]
    dropped: dict[str, int]


def load_tokenizer(base: str, *, revision: str | None = None, chat_template: str | None = None) -> ChatTokenizer:
    """The base model's tokenizer, with its own chat template or the given one.

    Raises:
        UserError: no tokenizer, no chat template, or one that does not end the assistant's turn.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.base: no tokenizer could be loaded from {base!r} ({reason})") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.chat_template: {chat_template} cannot be read ({error})") from None
    end = end_of_turn_id(tokenizer)
    return ChatTokenizer(tokenizer, end, tuple(sorted(token for token in special_tokens(tokenizer) if token)))


def tokenize(example: Example, chat: ChatTokenizer, *, max_length: int, merge: bool) -> Tokenized:
    """An example's sequences: one with all its responses, or one a response.

    Merging is right only where each prefix of the conversation is a prefix of the whole, in text and in
    tokens; some templates rewrite earlier turns (they remove their reasoning), and then it is unfolded.
    """
    turns = [index for index, message in enumerate(example.messages) if message.score is not None]
    if any(token in message.content for message in example.messages for token in chat.control_tokens):
        return Tokenized((), {"special token in the text": len(turns)})
    whole = _merged(example, turns, chat) if merge and len(turns) > 1 else None
    unfolded = [whole] if whole is not None else [_single(example, turn, chat) for turn in turns]
    fitting = [_fit(sequence, max_length) for sequence in unfolded]
    num_dropped = len(turns) - sum(len(sequence.responses) for sequence in fitting)
    return Tokenized(
        tuple(sequence for sequence in fitting if sequence.responses),
        {"longer than max_length": num_dropped} if num_dropped else {},
    )


def keep_first(sequence: Sequence, num_responses: int) -> Sequence:
    """The sequence up to its `num_responses`-th response; what follows cannot influence what is kept."""
    responses = sequence.responses[:num_responses]
    return Sequence(sequence.token_ids_T[: responses[-1].end if responses else 0], responses)


def _fit(sequence: Sequence, max_length: int) -> Sequence:
    return keep_first(sequence, sum(response.end <= max_length for response in sequence.responses))


def _merged(example: Example, turns: list[int], chat: ChatTokenizer) -> Sequence | None:
    text = chat.render(example.messages[: turns[-1] + 1])
    ids = chat.encode(text)
    responses = []
    for turn in turns:
        prompt_ids = chat.encode(chat.render(example.messages[:turn], for_generation=True))
        start = len(prompt_ids)
        alone = chat.render(example.messages[: turn + 1]).rstrip()
        if ids[:start] != prompt_ids or not text.startswith(alone):
            return None
        responses.append(_response(example, turn, ids, start, chat))
    return Sequence(np.asarray(ids[: responses[-1].end], dtype=np.int32), tuple(responses))


def _single(example: Example, turn: int, chat: ChatTokenizer) -> Sequence:
    prompt = chat.render(example.messages[:turn], for_generation=True)
    text = chat.render(example.messages[: turn + 1])
    if not text.startswith(prompt):
        raise UserError(
            f"{example.origin}: the chat template's generation prompt is not a prefix of the finished turn, so the "
            "response's tokens cannot be told from the prompt's; give another template by model.chat_template"
        )
    prompt_ids, ids = chat.encode(prompt), chat.encode(text)
    if ids[: len(prompt_ids)] != prompt_ids:
        # Two calls: no token may straddle the boundary, for at generation the prompt stands alone. Only here,
        # for a SentencePiece tokenizer would put a space before a response that is encoded by itself.
        ids = prompt_ids + chat.encode(text[len(prompt) :])
    response = _response(example, turn, ids, len(prompt_ids), chat)
    return Sequence(np.asarray(ids[: response.end], dtype=np.int32), (response,))


def _response(example: Example, turn: int, ids: list[int], start: int, chat: ChatTokenizer) -> Response:
    try:
        end = ids.index(chat.end_of_turn_id, start) + 1
    except ValueError:
        raise UserError(f"{example.origin}: the rendered turn does not end in the end-of-turn token") from None
    score = example.messages[turn].score
    assert score is not None
    return Response(start, end, score, example.kind, example.origin)
