"""The length of an answer as its raw score: in characters, or in tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uft_ds.scoring.item import Item, Judgement, found


class LengthScorer:
    """Counts the characters of an answer; with a tokenizer, its tokens (without special ones)."""

    batch_items = 1024

    def __init__(self, tokenizer: str | None = None) -> None:
        """
        Args:
            tokenizer: a model's folder, or a hub name.
        Raises:
            UserError: there is no tokenizer.
        """
        self._tokenizer = None
        self._identity = {"scorer": "length", "unit": "characters"}
        if tokenizer is not None:
            from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, read_tokenizer

            self._tokenizer = read_tokenizer(tokenizer)
            digest = ChatTokenizer(self._tokenizer, 0, ()).content_hash
            self._identity = {"scorer": "length", "unit": "tokens", "tokenizer": digest}

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        texts = [item.response for item in items]
        if self._tokenizer is None:
            return [found(len(text)) for text in texts]
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [found(len(tokens)) for tokens in ids]

    def close(self) -> None:
        """Nothing to end."""
