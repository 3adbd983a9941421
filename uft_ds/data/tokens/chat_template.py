"""Chat templates: render a conversation as text, and find the token that ends an assistant turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from uft_ds.errors import UserError
from uft_ds.host.bounded import bounded

REMEDY = (
    "give one with the recipe key `model.chat_template: path/to/template.jinja`, "
    "or put a `chat_template.jinja` into the model's folder"
)
PROBE = [
    {"role": "user", "content": "What is asked"},
    {"role": "assistant", "content": "What is answered"},
]


DATE = "26 Jul 2024"
"""The date for templates that use `date_string`: the default in Llama 3.1's template."""

_FIXED_DATE = "give a copy of it with a fixed date by model.chat_template"
_SECONDS = 10
"""CPU time that a template may take for one conversation: ten thousand times what those of known models take."""
_MEMORY = 4_000_000_000
"""Bytes of memory that it may take."""
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text. The template writes every special token, so the tokenizer must not add more.

    Raises:
        UserError: the tokenizer has no template, or the template refuses these messages (it has no system role, or
            the roles must alternate).
    """
    text, _ = _render(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, marked=False)
    return text


def render_marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the characters [start, end) inside each `{% generation %}` block.

    Raises:
        UserError: as for `render`.
    """
    return _render(tokenizer, messages, tools, add_generation_prompt=False, marked=True)


def marks_generation(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks the assistant's text by `{% generation %}` blocks."""
    return bool(_GENERATION_MARKER.search(template_of(tokenizer)))


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of the chat template. If there are several: the one for tools if `tools` are given, else the default.

    Raises:
        UserError: the tokenizer has no template.
    """
    try:
        return tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
    except ValueError:
        raise UserError(f"The tokenizer of `{tokenizer.name_or_path}` has no chat template: {REMEDY}.") from None


@lru_cache(maxsize=8)  # the search takes as long as to render a short conversation
def _without_today(template: str) -> str:
    """The template, changed to raise an error instead of writing today's date: tokens must not depend on the day.

    Also where it gives the function another name first.
    """
    called = re.sub(
        r"\bstrftime_now\s*\(", f"raise_exception('it writes the date of the day; {_FIXED_DATE}: ' ~ ", template
    )
    return re.sub(r"\bstrftime_now\b(?!\s+is\b)", "raise_exception", called)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    marked: bool,
) -> tuple[str, list[tuple[int, int]]]:
    template = _without_today(template_of(tokenizer, tools))
    try:
        with bounded(seconds=_SECONDS, memory=_MEMORY):
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked,
                date_string=DATE,
                **cast(dict[str, Any], tokenizer.special_tokens_map),
            )
    except Exception as error:
        # A template is a program, which may fail by any error: Jinja's own, a division by zero, endless recursion.
        roles = ", ".join(message["role"] for message in messages)
        reason = _reason(error)
        raise UserError(
            f"The chat template of `{tokenizer.name_or_path}` refuses a conversation of roles [{roles}]: "
            f"{reason}. Change the conversation, or {REMEDY}."
        ) from error
    texts, spans = rendered
    return texts[0], spans[0] if marked else []


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"it takes more than {_SECONDS} seconds of CPU time"
    if isinstance(error, MemoryError):
        return f"it takes more than {_MEMORY / 1e9:.0f} GB of memory, or more than there is"
    return f"{type(error).__name__}: {error}"


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the special token that the template writes after an assistant's text, at which generation stops.

    It is taken from a rendered probe, not from `eos_token`: base models often have an end-of-document token there
    (Qwen2.5 has `<|endoftext|>`, while its template closes turns by `<|im_end|>`). White space between the text and
    the token is allowed (Llama 2).

    Raises:
        UserError: there is no template, or no special token closes the assistant's turn.
    """
    text = render(tokenizer, PROBE)
    before, _, after = text.rpartition(PROBE[-1]["content"])
    if not before:
        raise UserError(f"The chat template of `{tokenizer.name_or_path}` leaves out the assistant's text: {REMEDY}.")
    closing = after.lstrip()
    matches = [token for token in special_tokens(tokenizer) if token and closing.startswith(token)]
    if not matches:
        raise UserError(
            f"The chat template of `{tokenizer.name_or_path}` does not close the assistant's turn with a "
            f"special token (after the answer comes {after[:40]!r}), so a model could not learn where to "
            f"stop: {REMEDY}."
        )
    # The longest match: one special token may be the beginning of another.
    return special_tokens(tokenizer)[max(matches, key=len)]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All special tokens, text to id: the named ones (eos, pad, ...) and those that are only marked as special."""
    marked = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return marked | named
