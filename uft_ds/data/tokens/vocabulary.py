"""Refuse a tokenizer whose ids go beyond the model's embedding: a run would fail on them after its launch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from uft_ds.data.tokens.chat_template import PROBE, render
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.errors import UserError

_SHOWN = 5


def check_fits_embedding(chat: ChatTokenizer, rows: int, token_ids: Iterable[np.ndarray] = ()) -> None:
    """Refuse token ids for which the embedding has no row.

    Special tokens beyond the embedding are refused only if the template or the data use them: Gemma 3's text models
    carry an image token that no text becomes. Ordinary tokens are refused, because any text may hold them.

    Args:
        rows: of the embedding.
        token_ids: of tokenised data, [tokens] each; read only if the tokenizer has ids beyond the embedding.
    Raises:
        UserError: names the tokens and their ids.
    """
    beyond = {index: token for token, index in chat.tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    special = set(chat.control_tokens)
    refused = {index for index, token in beyond.items() if token not in special}
    refused |= set(chat.encode(render(chat.tokenizer, PROBE))) & set(beyond)
    for array in token_ids:
        refused |= {int(index) for index in np.unique(array[array >= rows])}
    if not refused:
        return
    named = [f"{beyond.get(index, '?')!r} ({index})" for index in sorted(refused)]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    raise UserError(
        f"model.base: {chat.tokenizer.name_or_path}: its tokenizer has {', '.join(named[:_SHOWN])}{more}, but its "
        f"embedding has only {rows} rows (ids 0 to {rows - 1}); take the tokenizer of this model, remove the added "
        "tokens from it, or give the model rows for them (resize_token_embeddings) and train these first"
    )
