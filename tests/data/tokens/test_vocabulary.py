"""A tokenizer with more ids than the embedding has rows is refused, if text can become them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import CHATML, VOCAB_SIZE, build_tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.data.tokens.vocabulary import check_fits_embedding
from uft_ds.errors import UserError

DATA = [np.arange(VOCAB_SIZE, dtype=np.int32)]


def with_tokens(folder: Path, *tokens: str, special: bool, template: str = CHATML) -> ChatTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_tokenizer(folder))
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_as_many_rows_as_ids_are_enough(tmp_path: Path) -> None:
    """And more, as models are padded."""
    chat = with_tokens(tmp_path, special=False)
    for rows in (VOCAB_SIZE, VOCAB_SIZE + 5):
        check_fits_embedding(chat, rows, DATA)


def test_ordinary_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """By text and id, whether the data at hand uses them or not."""
    chat = with_tokens(tmp_path, "<think>", "</think>", special=False)
    with pytest.raises(UserError) as caught:
        check_fits_embedding(chat, VOCAB_SIZE)
    assert f"'<think>' ({VOCAB_SIZE}), '</think>' ({VOCAB_SIZE + 1})" in str(caught.value)
    assert f"only {VOCAB_SIZE} rows" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    check_fits_embedding(chat, VOCAB_SIZE + 2)


def test_special_tokens_beyond_the_embedding_are_refused_where_they_are_used(tmp_path: Path) -> None:
    """By the template in every conversation, or in some row of the data; never used, they do no harm."""
    unused = with_tokens(tmp_path / "unused", "<image>", special=True)
    check_fits_embedding(unused, VOCAB_SIZE, DATA)
    with pytest.raises(UserError, match=rf"'<image>' \({VOCAB_SIZE}\)"):
        check_fits_embedding(unused, VOCAB_SIZE, [*DATA, np.array([3, VOCAB_SIZE], dtype=np.int32)])
    written = with_tokens(tmp_path / "written", "<image>", special=True, template="{{ '<image>' }}" + CHATML)
    with pytest.raises(UserError, match=rf"'<image>' \({VOCAB_SIZE}\)"):
        check_fits_embedding(written, VOCAB_SIZE)
