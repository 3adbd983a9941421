"""What is supervised of a conversation, by the public API of transformers alone: slow, and one turn at a time.

    prompt      apply_chat_template(the turns before, add_generation_prompt=True): what a model is given
    response    what apply_chat_template of the turns up to this one writes after it, to the end-of-turn token

It shares no code with the package: no spans, no merging, no cache. A thought without text belongs to the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft_ds.data.example import Example, Pair


class CannotBeLearned(Exception):
    """The template refuses the conversation, or does not continue the prompt, or does not end the turn."""


@dataclass(frozen=True)
class Supervised:
    """One response: the tokens before it, its text with the end of turn, its number of tokens and its score.

    longest: the number of tokens that must fit: up to the response's end, or to that of the longer side of a pair.
    """

    prompt_ids: tuple[int, ...]
    text: str
    num_tokens: int
    score: float
    longest: int


def supervised(item: Example | Pair, tokenizer: Any, end_of_turn: str) -> list[Supervised]:
    """The responses of an item in the order of its turns; of a pair the chosen one first.

    Raises:
        CannotBeLearned: in one of them prompt and response cannot be told apart.
    """
    sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
    return [
        _response(side, turn, tokenizer, end_of_turn)
        for side in sides
        for turn, message in enumerate(side.messages)
        if message.score is not None
    ]


def _response(example: Example, turn: int, tokenizer: Any, end_of_turn: str) -> Supervised:
    score = example.messages[turn].score
    assert score is not None
    assert example.messages[turn].role == "assistant"
    turns = [_as_dict(message) for message in example.messages[: turn + 1]]
    prompt = _written(tokenizer, turns[:-1], example.tools, add_generation_prompt=True)
    whole = _written(tokenizer, turns, example.tools, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise CannotBeLearned("the prompt is not the beginning of the finished turn")
    response = whole[len(prompt) :]
    if end_of_turn not in response:
        raise CannotBeLearned("the turn is not ended")
    thought = _empty_thought(prompt, response)
    prompt, response = prompt + thought, response[len(thought) :]
    text = response[: response.index(end_of_turn) + len(end_of_turn)]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    num_tokens = len(_continued(tokenizer, text))
    return Supervised(tuple(ids), text, num_tokens, score, longest=len(ids) + num_tokens)


def _continued(tokenizer: Any, text: str) -> list[int]:
    """The tokens of text that follows other text: without the space that SentencePiece puts before any text."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    begins = tokenizer.convert_ids_to_tokens(ids[:1])
    return ids[1:] if begins == ["▁"] else ids


def _as_dict(message: Any) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    turn.update(message.extras)
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    return turn


def _written(
    tokenizer: Any, turns: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns),
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # noqa: BLE001 - a template is a program, which may fail by any error
        raise CannotBeLearned(f"{type(error).__name__}: {error}") from None
    return text


def _empty_thought(prompt: str, response: str) -> str:
    """`<think></think>` with nothing but white space inside, and at most two newlines after it; else nothing."""
    position = 0
    if not prompt.rstrip().endswith("<think>"):
        position = _after(response, position, "<think>")
    position = _after(response, position, "</think>") if position >= 0 else -1
    if position < 0:
        return ""
    for _ in range(2):
        position += response[position : position + 1] == "\n"
    return response[:position]


def _after(text: str, position: int, tag: str) -> int:
    """The end of a tag that follows white space; -1 if something else follows."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position + len(tag) if text.startswith(tag, position) else -1
