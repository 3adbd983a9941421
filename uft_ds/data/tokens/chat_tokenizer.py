"""A tokenizer with its chat template: open it, encode text, and save it so that it tokenises the same again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from uft_ds.data.example import Message
from uft_ds.data.tokens.chat_template import (
    end_of_turn_id,
    marks_generation,
    render,
    render_marked,
    special_tokens,
    template_of,
)
from uft_ds.data.tokens.encoding import encoder_of
from uft_ds.data.tokens.pieces import check_pieces
from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text
from uft_ds.host.terminal import in_one_line

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip

_PLAIN_TEXT = "Hello"
_FETCH = "expected tokenizer.json or tokenizer.model; fetch the tokenizer's files of the same model"


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer whose chat template closes the assistant's turn with one special token.

    control_tokens: the texts of all special tokens, which data must not contain.
    placeholders: the texts of tokens in whose places the base reads images, films or sound, special or not.
    marked: whether the template marks the assistant's text by `{% generation %}` blocks.
    revision: the revision of a hub model.
    """

    tokenizer: Any
    end_of_turn_id: int
    control_tokens: tuple[str, ...]
    marked: bool = False
    revision: str | None = None
    placeholders: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """A hash, hex, of tokenizer and chat template: with equal hashes a conversation has the same tokens."""
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        parts = [vocabulary_of(self.tokenizer), json.dumps(self.tokenizer.special_tokens_map), template]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def end_of_turn(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id))

    def render(self, messages: Seq[Message], *, tools: Seq[Any] = (), for_generation: bool = False) -> str:
        if not for_generation:
            return render(self.tokenizer, _turns(messages), tools=tools)
        # By their text: a template may write equal objects differently, such as 1 and True, or other orders of keys.
        asked = repr((tuple(messages), tuple(tools)))
        if self._last_prompt.get("asked") != asked:
            text = render(self.tokenizer, _turns(messages), tools=tools, add_generation_prompt=True)
            self._last_prompt.update(asked=asked, text=text)
        return str(self._last_prompt["text"])

    @cached_property
    def _last_prompt(self) -> dict[str, Any]:
        """The prompt that was rendered last, with its messages and tools: both sides of a pair ask for it."""
        return {}

    def render_marked(self, messages: Seq[Message], tools: Seq[Any]) -> tuple[str, list[tuple[int, int]]]:
        return render_marked(self.tokenizer, _turns(messages), tools=tools)

    def encode(self, text: str) -> list[int]:
        # The template has already written every special token; adding them again would double the BOS token.
        return self._encode(text)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        return encoder_of(self.tokenizer)

    def encode_continued(self, text: str) -> list[int]:
        """The tokens of text that follows other text, without a token that crosses the boundary.

        SentencePiece puts a space before every text. For such a tokenizer the text is encoded after a newline, which
        merges with nothing, and the tokens of the newline are removed.
        """
        if self._puts_a_space_first:
            before, both = self.encode("\n"), self.encode("\n" + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)

    @cached_property
    def _puts_a_space_first(self) -> bool:
        return str(self.tokenizer.convert_ids_to_tokens(self.encode("a")[:1])[0]).startswith("▁")

    def holds_control_token(self, messages: Seq[Message], tools: Seq[Any]) -> bool:
        """Whether text of the data contains a special token, which only the template may write."""
        return _hold_one_of(self.control_tokens, messages, tools)

    def holds_placeholder(self, messages: Seq[Message], tools: Seq[Any]) -> bool:
        """Whether text of the data stands for an image, a film or sound, which the base is not given."""
        return _hold_one_of(self.placeholders, messages, tools)


def _hold_one_of(tokens: tuple[str, ...], messages: Seq[Message], tools: Seq[Any]) -> bool:
    texts = [text for message in messages for text in (message.content, *(value for _, value in message.extras))]
    texts += [json.dumps(call, ensure_ascii=False) for message in messages for call in message.tool_calls]
    texts += [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return any(token in text for text in texts for token in tokens)


def with_placeholders(chat: ChatTokenizer, ids: Collection[int]) -> ChatTokenizer:
    """The tokenizer that knows which of its tokens stand for images, films or sound.

    Args:
        ids: as the base's config has them. One that is no added token is ordinary text, whatever the config says.
    """
    added = chat.tokenizer.added_tokens_decoder if ids else {}
    return replace(chat, placeholders=tuple(sorted(token.content for index, token in added.items() if index in ids)))


def vocabulary_of(tokenizer: Any) -> str:
    """All by which a tokenizer turns text into tokens, as text: with equal ones a text has the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else str(backend.to_str())


def open_tokenizer(base: str, *, revision: str | None = None, chat_template: str | None = None) -> ChatTokenizer:
    """The base model's tokenizer, with its own chat template or the given one.

    Raises:
        UserError: there is no tokenizer or no chat template, or it does not close the assistant's turn.
    """
    tokenizer = checked_tokenizer(base, revision=revision)
    if chat_template is None:
        return chat_tokenizer_of(tokenizer, revision=revision)
    set_template(tokenizer, chat_template)
    try:
        return chat_tokenizer_of(tokenizer, revision=revision)
    except UserError as error:
        raise UserError(f"model.chat_template: {chat_template}: {error}") from None


def checked_tokenizer(base: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model's folder or of a hub model, which splits text as the model's own pieces do.

    Raises:
        UserError: there is none, or it splits text otherwise.
    """
    tokenizer = read_tokenizer(base, revision=revision)
    model = _file_of(base, "tokenizer.model", revision)
    if model is not None and _file_of(base, "tokenizer.json", revision) is None:
        check_pieces(base, tokenizer, model)
    return tokenizer


def set_template(tokenizer: Any, path: str) -> None:
    """Give a tokenizer the chat template of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        # An editor's byte-order mark would be a token at the start of every prompt.
        tokenizer.chat_template = read_regular_text(Path(path)).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {path} cannot be read ({error})") from None


def chat_tokenizer_of(tokenizer: Any, *, revision: str | None = None) -> ChatTokenizer:
    """A tokenizer with the token that closes the assistant's turn in its chat template.

    Raises:
        UserError: it has no chat template, or none that closes the assistant's turn.
    """
    end = end_of_turn_id(tokenizer)
    control = tuple(sorted(token for token in special_tokens(tokenizer) if token))
    return ChatTokenizer(tokenizer, end, control, marks_generation(tokenizer), revision)


def read_tokenizer(base: str, *, revision: str | None = None, local_files_only: bool = False) -> Any:
    """The tokenizer of a model's folder or of a hub model, as transformers reads it; its own code is never run.

    Raises:
        UserError: says what is missing or wrong, and in which file where that is known.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=revision, trust_remote_code=False, local_files_only=local_files_only
        )
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = _file_of(base, name, revision)
            if path is not None:
                _check_is_an_object(path)
        raise UserError(
            f"model.base: no tokenizer could be loaded from {base!r}: {_why_unreadable(base, error)}"
        ) from None
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise UserError(
            f"model.base: {base}: model_max_length: {longest!r} found in tokenizer_config.json, expected a number; "
            "correct it, or fetch the file again"
        )
    # For Qwen2 and others transformers makes a tokenizer without a vocabulary if the folder holds none: every text
    # would be no token at all, or unknown ones.
    ids = tokenizer(_PLAIN_TEXT, add_special_tokens=False)["input_ids"]
    if not set(ids) - set(tokenizer.all_special_ids):
        raise UserError(
            f"model.base: no tokenizer could be loaded from {base!r}: {_PLAIN_TEXT!r} has no tokens in it; {_FETCH}"
        )
    return tokenizer


def _check_is_an_object(path: Path) -> None:
    """Refuse a JSON file that is none: the errors of transformers name neither the file nor the remedy."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.base: {path}: cannot be read ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"model.base: {path}: {json.dumps(value)[:40]} found, expected an object; fetch the file again")


def _why_unreadable(base: str, error: Exception) -> str:
    """Why there is no tokenizer, and what to do; transformers' advice concerns its own arguments and packages."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it needs code of its own (auto_map in tokenizer_config.json), which is never run; take a model whose "
            "tokenizer is one of transformers' own"
        )
    if not Path(base).is_dir():
        return in_one_line(text, 500)
    if "instantiate the backend tokenizer" in text:
        return _FETCH
    return f"{in_one_line(text, 500)}; correct its files, or fetch them again"


def save_tokenizer(chat: ChatTokenizer, folder: Path) -> None:
    """Save a tokenizer and its chat template so that the saved one tokenises as this one does.

    `save_pretrained` is not enough: transformers 5.23 loses `legacy` of LlamaTokenizer, and Mistral's tokenizer would
    then read `<s>[INST]` as other tokens. So the files that it was loaded from are copied over the saved ones.
    """
    chat.tokenizer.save_pretrained(folder)
    source = chat.tokenizer.name_or_path
    for name in _TOKENIZER_FILES:
        original = _file_of(source, name, chat.revision)
        if original is not None:
            shutil.copyfile(original, folder / name)
    (folder / "chat_template.jinja").write_text(template_of(chat.tokenizer), encoding="utf-8")


def _file_of(base: str, name: str, revision: str | None) -> Path | None:
    """A file of a local model's folder, or of a hub model in the cache; None if it is not there."""
    cached = None if Path(base).exists() else try_to_load_from_cache(base, name, revision=revision)
    path = Path(cached) if isinstance(cached, str) else Path(base) / name
    return path if path.is_file() else None


def _turns(messages: Seq[Message]) -> list[dict[str, Any]]:
    return [
        {"role": m.role, "content": m.content, **dict(m.extras)}
        | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        for m in messages
    ]
