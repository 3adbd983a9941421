"""Encode text as a tokenizer does, but each piece between its added tokens once.

A prompt is the beginning of the text that is trained on, and of its other answers' texts: encoded as a whole, it would
be encoded again each time. Tokenizers split text at added tokens before anything else, so the pieces between them have
the same tokens alone. Where that is not so, as with tokens that swallow white space, the text is encoded as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_REMEMBERED = 64
"""Number of pieces whose tokens are kept: those of a conversation of many turns, and a template's own words."""

_TEXTS = (
    "Hello", " Hello", "\nHello world", "Hello \n", "\n\n", " ", "  two  spaces\t\ttab", "don't 1234567890 + 42 = x[0]",
    "Zürich, 東京, naïve - \u201cquoted\u201d", "a\u0301 \ufb01 \u2581x", "\r\n", "user\nWhat is asked?",
    "[INST] x [/INST]",
)  # fmt: skip
"""Beginnings and ends at which a piece could have other tokens alone."""


def encode_whole(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as transformers' tokenizer gives them, without tokens that the text does not hold."""
    # verbose=False: sequences longer than the tokenizer's own limit are no problem here, `max_length` decides.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """The fastest way to encode that gives the tokenizer's own ids: by pieces where that is exact, else as a whole."""
    whole = Whole(tokenizer)
    if not _splits_at_added_tokens(tokenizer):
        return whole
    pieces = Pieces(tokenizer)
    return pieces if all(pieces(text) == whole(text) for text in _probes(tokenizer)) else whole


class Whole:
    """Encodes each text as a whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return encode_whole(self._tokenizer, text)


class Pieces:
    """Encodes the pieces between added tokens, and remembers the last ones."""

    def __init__(self, tokenizer: Any) -> None:
        self._added: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content
        }
        # The longest first: of two added tokens that begin at one place, tokenizers take the longer.
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._backend = tokenizer.backend_tokenizer
        self._remembered: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(self._added[part])
            elif part:
                ids += self._piece(part)
        return ids

    def _piece(self, text: str) -> list[int]:
        found = self._remembered.pop(text, None)
        if found is None:
            # A batch of one: only batches have the way that leaves out the offsets, an eighth of the time.
            found = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        self._remembered[text] = found  # the newest last
        if len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return found


def _splits_at_added_tokens(tokenizer: Any) -> bool:
    """Whether added tokens are found in the text as it is, without the white space or the words around them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None or getattr(tokenizer, "split_special_tokens", False):
        return False
    if getattr(backend.model, "dropout", None):
        return False  # byte pairs that are merged at random
    tokens = list(tokenizer.added_tokens_decoder.values())
    reach_out = any(token.lstrip or token.rstrip or token.single_word for token in tokens)
    # Those that are normalized are searched after the others: one search for both could split otherwise.
    kinds = {token.normalized for token in tokens}
    are_normalized = len(kinds) > 1 or (backend.normalizer is not None and True in kinds)
    # A pre-tokenizer that puts a space before a text's first piece would put it before every piece.
    treats_first_apart = b'"prepend_scheme":"first"' in bytes(backend.pre_tokenizer.__getstate__())
    return bool(tokens) and not reach_out and not are_normalized and not treats_first_apart


def _probes(tokenizer: Any) -> Iterator[str]:
    """Texts with added tokens at all places: alone, beside each other, at the beginning and at the end."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content]
    few = [*tokens[:8], *tokens[-8:]]
    yield from _TEXTS
    for number, text in enumerate(_TEXTS):
        one, other = few[number % len(few)], few[-1 - number % len(few)]
        next_text = _TEXTS[(number + 1) % len(_TEXTS)]
        yield f"{one}{text}"
        yield f"{text}{one}{next_text}"
        yield f"{text}{one}{other}{next_text}{other}"
    yield "".join(f"{token}{text}" for token, text in zip(few, _TEXTS * 2, strict=False))
