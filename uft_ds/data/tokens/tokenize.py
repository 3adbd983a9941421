"""Tokenise examples by the chat template, with exact spans of the supervised tokens.

If the template has `{% generation %}` blocks, a response's span begins where its block begins; otherwise it begins
where the generation prompt ends. In both cases the tokens before the span are those of the preceding text alone. So a
response's log-probability is that of exactly the tokens that the model has to generate, end-of-turn token included.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from uft_ds.data.example import Exact, Example, Message, Pair, Response, Sequence, Unit, keep_first
from uft_ds.data.formats.fields import shown
from uft_ds.data.tokens.chat_template import PROBE, REMEDY
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, open_tokenizer
from uft_ds.data.tokens.trimming import common_prompt, fitting_prompt
from uft_ds.errors import UserError

LONG = "longer than max_length"
CONTROL = "special token in the text"
PLACEHOLDER = "image placeholder in the text"
EQUAL = "chosen equals rejected"
TRIMMED = "prompt trimmed to max_length"

# At most two newlines after the thought, as templates write them: further white space belongs to the answer.
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\n{0,2}")
_EMPTY_REST_OF_THOUGHT = re.compile(r"\s*</think>\n{0,2}")


_THOUGHT = "reasoning_content"
_OTHER_TEXT = "·"
"""In place of a part of a conversation, to see whether the template writes it."""
_LONG_PART = 8
"""Characters; shorter parts may stand in a template's own text."""


@dataclass(frozen=True)
class Tokenized:
    """The units of one example, and the number of its responses that were dropped or changed, by reason."""

    units: tuple[Unit, ...]
    dropped: dict[str, int]
    changed: dict[str, int]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(sequence for unit in self.units for sequence in unit)


def load_tokenizer(base: str, *, revision: str | None = None, chat_template: str | None = None) -> ChatTokenizer:
    """The base model's tokenizer, with its own chat template or the given one, checked to give exact spans.

    Raises:
        UserError: there is no tokenizer or no chat template, or the template does not separate the response's tokens
            from the prompt's.
    """
    chat = open_tokenizer(base, revision=revision, chat_template=chat_template)
    _check_spans_are_exact(chat)
    return chat


def tokenize(
    item: Example | Pair,
    chat: ChatTokenizer,
    *,
    max_length: int,
    merge: bool,
    trim_prompt: bool = False,
) -> Tokenized:
    """The units of an example: one sequence with all its responses, one sequence per response, or two sides of a pair.

    Merging into one sequence is correct only if each prefix of the conversation is a prefix of the whole, in text and
    in tokens. Some templates rewrite earlier turns (they remove the reasoning); then each response is a sequence.

    Args:
        max_length: longest sequence, in tokens.
        merge: put all responses of a conversation into one sequence where that is correct.
        trim_prompt: keep a response that would end past max_length, with only the end of its prompt, instead of
            dropping it.
    Raises:
        ValueError: in this conversation the response's tokens cannot be separated from the prompt's.
    """
    if isinstance(item, Example) and item.exact is not None:
        return _exact(item, item.exact, chat, max_length)
    examples = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
    if any(chat.holds_placeholder(example.messages, example.tools) for example in examples):
        return Tokenized((), {PLACEHOLDER: item.num_responses}, {})
    if any(chat.holds_control_token(example.messages, example.tools) for example in examples):
        return Tokenized((), {CONTROL: item.num_responses}, {})
    try:
        for example in examples:
            _check_tools_are_written(example, chat)
        if isinstance(item, Pair):
            return _pair(item, chat, max_length, trim_prompt)
        return _conversation(item, chat, max_length, merge, trim_prompt)
    except UserError as error:  # the template refuses this conversation: only this row is bad
        raise ValueError(str(error)) from None


def _exact(example: Example, exact: Exact, chat: ChatTokenizer, max_length: int) -> Tokenized:
    """The sequence of given tokens."""
    if exact.tokenizer != chat.content_hash:
        raise ValueError(
            f"its tokens are of the tokenizer {exact.tokenizer[:12]}, the base has {chat.content_hash[:12]}; train on "
            "it with the base of the run that recorded it"
        )
    ids = (*exact.prompt_ids, *exact.answer_ids)
    if len(ids) > max_length:
        return Tokenized((), {LONG: 1}, {})
    score = example.messages[-1].score
    assert score is not None
    response = Response(len(exact.prompt_ids), len(ids), score, example.kind)
    return Tokenized(((Sequence(np.asarray(ids, dtype=np.int32), (response,)),),), {}, {})


def _conversation(example: Example, chat: ChatTokenizer, max_length: int, merge: bool, trim_prompt: bool) -> Tokenized:
    turns = [index for index, message in enumerate(example.messages) if message.score is not None]
    whole = _merged(example, turns, chat) if merge and len(turns) > 1 else None
    unfolded = [whole] if whole is not None else [_single(example, turn, chat) for turn in turns]
    fitting = [keep_first(s, sum(response.end <= max_length for response in s.responses)) for s in unfolded]
    sequences = [sequence for sequence in fitting if sequence.responses]
    # Long responses are not always the last ones: a template that removes earlier thoughts shortens later sequences.
    ends = [response.end for sequence in unfolded for response in sequence.responses]
    long_turns = [turn for turn, end in zip(turns, ends, strict=True) if end > max_length]
    changed: Counter[str] = Counter()
    if trim_prompt:
        trimmed = [_trimmed(_upto(example, turn), chat, max_length) for turn in long_turns]
        found = [sequence for sequence in trimmed if sequence is not None]
        sequences += found
        changed[TRIMMED] = len(found)
    num_dropped = len(turns) - sum(len(sequence.responses) for sequence in sequences)
    return Tokenized(tuple((sequence,) for sequence in sequences), dict(+Counter({LONG: num_dropped})), dict(+changed))


def _pair(pair: Pair, chat: ChatTokenizer, max_length: int, trim_prompt: bool) -> Tokenized:
    examples = (pair.chosen, pair.rejected)
    sides = tuple(_single(side, len(side.messages) - 1, chat) for side in examples)
    changed = {}
    if max(side.num_tokens for side in sides) > max_length:
        shared = common_prompt(pair) if trim_prompt else ()
        fitting = fitting_prompt(
            shared,
            lambda prompt: all(
                _single(_with_prompt(side, len(shared), prompt), -1, chat).num_tokens <= max_length for side in examples
            ),
        )
        if fitting is None:
            return Tokenized((), {LONG: 2}, {})
        cut = tuple(_with_prompt(side, len(shared), fitting) for side in examples)
        sides = tuple(_single(side, -1, chat) for side in cut)
        changed = {TRIMMED: 2}
    if np.array_equal(sides[0].token_ids_T, sides[1].token_ids_T):
        return Tokenized((), {EQUAL: 2}, {})
    unit = tuple(replace(side, responses=(replace(side.responses[0], pair_id=0),)) for side in sides)
    return Tokenized((unit,), {}, changed)


def _merged(example: Example, turns: list[int], chat: ChatTokenizer) -> Sequence | None:
    text = chat.render(example.messages[: turns[-1] + 1], tools=example.tools)
    ids = chat.encode(text)
    responses = []
    for turn in turns:
        prompt, alone = _prompt_and_text(example, turn, chat)
        prompt_ids = chat.encode(prompt)
        start = len(prompt_ids)
        # The template may rewrite earlier turns, and a token may cross the boundary: then nothing is merged.
        if ids[:start] != prompt_ids or not text.startswith(alone.rstrip()):
            return None
        responses.append(_response(example, turn, ids, start, chat))
    return Sequence(np.asarray(ids[: responses[-1].end], dtype=np.int32), tuple(responses))


def _single(example: Example, turn: int, chat: ChatTokenizer) -> Sequence:
    turn %= len(example.messages)
    prompt, text = _prompt_and_text(example, turn, chat)
    prompt_ids, ids = chat.encode(prompt), chat.encode(text)
    if ids[: len(prompt_ids)] != prompt_ids:
        # No token may cross the boundary, because at generation the prompt is encoded alone.
        ids = prompt_ids + chat.encode_continued(text[len(prompt) :])
    response = _response(example, turn, ids, len(prompt_ids), chat)
    return Sequence(np.asarray(ids[: response.end], dtype=np.int32), (response,))


def _prompt_and_text(example: Example, turn: int, chat: ChatTokenizer) -> tuple[str, str]:
    """(the text before the response of a turn, the text up to the end of that turn)"""
    upto = example.messages[: turn + 1]
    if chat.marked:
        text, spans = chat.render_marked(upto, example.tools)
        # The turn's own blocks come after those of earlier turns. Some templates do not mark turns that call tools.
        own = spans[len(chat.render_marked(example.messages[:turn], example.tools)[1]) :]
        if not own:
            raise ValueError(f"the chat template's `{{% generation %}}` blocks leave out this turn; {REMEDY}")
        prompt = text[: own[0][0]]
    else:
        text = chat.render(upto, tools=example.tools)
        prompt = chat.render(example.messages[:turn], tools=example.tools, for_generation=True)
        if not text.startswith(prompt):
            raise ValueError(
                "the chat template's generation prompt is not a prefix of the finished turn, so the response's tokens "
                f"cannot be separated from the prompt's; {REMEDY}"
            )
    _check_parts_are_written(replace(example, messages=upto), text, chat)
    _check_answer_is_whole(upto[-1].content, prompt, text)
    if chat.end_of_turn not in text[len(prompt) :]:
        raise ValueError(
            f"the chat template ends this turn by another token than {chat.end_of_turn!r}, which closes answers"
        )
    # An empty thought belongs to the prompt: templates of reasoning models write it before an answer without thoughts,
    # and into the generation prompt when thinking is switched off. It should not be learned.
    thought = _EMPTY_REST_OF_THOUGHT if prompt.rstrip().endswith("<think>") else _EMPTY_THOUGHT
    empty = thought.match(text, len(prompt))
    return (text[: empty.end()] if empty else prompt), text


def _response(example: Example, turn: int, ids: list[int], start: int, chat: ChatTokenizer) -> Response:
    try:
        end = ids.index(chat.end_of_turn_id, start) + 1
    except ValueError:
        raise ValueError("the rendered turn does not end in the end-of-turn token") from None
    score = example.messages[turn].score
    assert score is not None
    return Response(start, end, score, example.kind)


def _check_tools_are_written(example: Example, chat: ChatTokenizer) -> None:
    """Refuse tools or calls that the template does not write: a missing call would teach the model an empty answer."""
    messages, tools = example.messages, example.tools
    if not tools and not any(message.tool_calls for message in messages):
        return
    text = chat.render(messages, tools=tools)
    if tools and chat.render(messages) == text:
        raise ValueError(f"the chat template does not write the tools of a conversation; {REMEDY}")
    for index, message in enumerate(messages):
        if message.tool_calls:
            silent = (*messages[:index], replace(message, tool_calls=()), *messages[index + 1 :])
            if chat.render(silent, tools=tools) == text:
                raise ValueError(f"the chat template does not write the tool calls of turn {index}; {REMEDY}")


def _check_parts_are_written(example: Example, text: str, chat: ChatTokenizer) -> None:
    """Refuse a conversation up to a response of which the template leaves out a part.

    The parts are the turns that are not the assistant's, and the response's own reasoning and text beside calls.
    Earlier turns of the assistant may be shortened: templates of reasoning models drop their thoughts by design.

    Args:
        text: the conversation as the template writes it.
    """
    messages = example.messages
    pieces = [piece for message in messages for piece in (message.content, *dict(message.extras).values())]
    pieces += [json.dumps(calls, ensure_ascii=False) for calls in (example.tools, *(m.tool_calls for m in messages))]
    for index, message in enumerate(messages):
        parts: list[tuple[str, str, Message]] = []
        if message.role != "assistant":
            parts.append((f"{message.role} turn", message.content, replace(message, content=_OTHER_TEXT)))
        elif index == len(messages) - 1:
            if message.tool_calls:
                beside = replace(message, content=_OTHER_TEXT)
                parts.append(("text beside the calls of turn", message.content, beside))
            extras = dict(message.extras)
            other = replace(message, extras=tuple((extras | {_THOUGHT: _OTHER_TEXT}).items()))
            parts.append((f"{_THOUGHT} of turn", extras.get(_THOUGHT, ""), other))
        for what, part, other in parts:
            is_long = message.role == "user" or len(part.strip()) >= _LONG_PART
            if part.strip() and not (is_long and _stands_in(text, part.strip(), pieces)):
                changed = replace(example, messages=(*messages[:index], other, *messages[index + 1 :]))
                if not _renders_otherwise(example, changed, chat):
                    raise ValueError(f"the chat template does not write the {what} {index}; {REMEDY}")


def _check_answer_is_whole(answer: str, prompt: str, text: str) -> None:
    """Refuse a supervised turn of which the template leaves out a part, as some cut what comes before `</think>`.

    White space may change, and a thought without text may be left out.

    Args:
        prompt: the text before the response; it may end with the `<think>` that begins the answer.
        text: up to the end of the turn.
    """
    written = text[len(prompt.rstrip().removesuffix("<think>")) :]
    if answer.strip() in written:
        return
    found = _without_spaces(written)
    said = _EMPTY_THOUGHT.sub("", answer, count=1)
    forms = [_without_spaces(form) for form in (said, json.dumps(said, ensure_ascii=False)[1:-1])]
    if not any(form in found or form.removeprefix("<think>") in found for form in forms):
        kept = "its thought is left out" if "</think>" in answer else f"{shown(written.strip())} instead"
        raise ValueError(f"the chat template does not write the whole text of an answer ({kept}); {REMEDY}")


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _stands_in(text: str, part: str, pieces: list[str]) -> bool:
    """Whether a part stands in the text as often as in all pieces of the conversation, as it is or escaped as JSON."""
    needed = sum(piece.count(part) for piece in pieces)
    return any(text.count(form) >= needed for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _renders_otherwise(example: Example, changed: Example, chat: ChatTokenizer) -> bool:
    try:
        other = chat.render(changed.messages, tools=changed.tools)
    except UserError:  # the template looks at the part, or it would not refuse the other text
        return True
    return other != chat.render(example.messages, tools=example.tools)


def _trimmed(example: Example, chat: ChatTokenizer, max_length: int) -> Sequence | None:
    prompt = example.messages[:-1]

    def fits(shorter: tuple[Message, ...]) -> bool:
        return _single(_with_prompt(example, len(prompt), shorter), -1, chat).num_tokens <= max_length

    fitting = fitting_prompt(prompt, fits)
    return None if fitting is None else _single(_with_prompt(example, len(prompt), fitting), -1, chat)


def _upto(example: Example, turn: int) -> Example:
    """The conversation up to one response; earlier responses become context."""
    context = tuple(replace(message, score=None) for message in example.messages[:turn])
    return replace(example, messages=(*context, example.messages[turn]))


def _with_prompt(example: Example, length: int, prompt: tuple[Message, ...]) -> Example:
    return replace(example, messages=(*prompt, *example.messages[length:]))


def _check_spans_are_exact(chat: ChatTokenizer) -> None:
    """Refuse a template that separates the response from the prompt in neither probe, with a thought or without.

    Each conversation is checked again when it is tokenised.
    """
    question, answer = PROBE[0]["content"], PROBE[1]["content"]
    problems = []
    for content in (answer, f"<think>\nA thought\n</think>\n\n{answer}"):
        probe = Example((Message("user", question), Message("assistant", content, 1.0)), "instruction")
        try:
            sequence = _single(probe, 1, chat)
        except (ValueError, UserError) as error:
            problems.append(str(error))
            continue
        _check_bos_is_single(chat, sequence)
        return
    name = chat.tokenizer.name_or_path
    raise UserError(f"The chat template of `{name}` cannot be learned from: {problems[0]}.")


def _check_bos_is_single(chat: ChatTokenizer, sequence: Sequence) -> None:
    bos = chat.tokenizer.bos_token_id
    if bos is not None and bos != chat.end_of_turn_id and sequence.token_ids_T[:2].tolist() == [bos, bos]:
        raise UserError(f"The chat template of `{chat.tokenizer.name_or_path}` begins with two BOS tokens: {REMEDY}.")
