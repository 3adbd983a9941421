"""Encoding by pieces gives the tokenizer's own ids, or is not used."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import mistral_tokenizer, qwen25_tokenizer
from suites import long_but
from tiny import build_tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from uft_ds.data.tokens.encoding import Pieces, Whole, encode_whole, encoder_of

MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "<tool_call>"]
ENCODERS: dict[int, Any] = {}
"""By tokenizer: made once, so that pieces of many texts are remembered."""
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=12)), max_size=8).map("".join)


@cache
def loaded(folder: Path) -> Any:
    """A real tokenizer, which takes seconds to load."""
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module", params=long_but(["tiny"], ["tiny", "qwen2.5", "mistral"]))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))))
    return loaded(qwen25_tokenizer() if request.param == "qwen2.5" else mistral_tokenizer())


@given(text=TEXTS)
@settings(deadline=None, max_examples=300)
def test_any_text_has_the_tokenizers_own_ids(text: str, tokenizer: Any) -> None:
    """Also the second time, when its pieces are remembered."""
    encode = encoder_of(tokenizer) if id(tokenizer) not in ENCODERS else ENCODERS[id(tokenizer)]
    ENCODERS[id(tokenizer)] = encode
    assert encode(text) == encode(text) == encode_whole(tokenizer, text)


def test_an_encoder_is_sent_to_other_processes(tokenizer: Any) -> None:
    """As the workers get it that tokenise a large source."""
    encode, text = encoder_of(tokenizer), "<|im_start|>user\nWhich is red?<|im_end|>\n"
    sent = pickle.loads(pickle.dumps(encode))
    assert type(sent) is type(encode)
    assert sent(text) == encode_whole(tokenizer, text)


@pytest.mark.long
def test_a_tokenizer_of_byte_pairs_is_encoded_by_pieces() -> None:
    """Qwen2.5's: otherwise the test above would compare the tokenizer with itself."""
    assert isinstance(encoder_of(loaded(qwen25_tokenizer())), Pieces)


def words(**added: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words with one added token."""
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first")
        if added.pop("first", False)
        else (pre_tokenizers.Split(" ", "isolated"))
    )
    inner.add_special_tokens([AddedToken("<x>", **added)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.mark.parametrize("reach", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_reaches_out_is_encoded_as_a_whole(reach: str) -> None:
    """The white space beside it is a part of it, or the word around it decides: pieces would not know."""
    assert isinstance(encoder_of(words()), Pieces)
    assert isinstance(encoder_of(words(**{reach: True})), Whole)


def test_a_space_before_the_first_piece_alone_is_encoded_as_a_whole() -> None:
    """As some SentencePiece tokenizers have it: each piece alone would be a first one.

    Of this one no probe shows it, whose words it does not know.
    """
    assert isinstance(encoder_of(words(first=True)), Whole)


def test_merges_at_random_are_encoded_as_a_whole() -> None:
    """Byte pairs with dropout: tokens that are remembered would not be drawn again."""
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<x>": 3}, [("a", "b")], dropout=0.5))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<x>"])
    assert isinstance(encoder_of(PreTrainedTokenizerFast(tokenizer_object=inner)), Whole)


@pytest.mark.long
def test_a_piece_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, then two texts that begin with it: four pieces in all, the separators from memory."""
    tokenizer = loaded(qwen25_tokenizer())
    encode = encoder_of(tokenizer)
    asked: list[str] = []

    class Backend:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            asked.extend(texts)
            return tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)

    monkeypatch.setattr(encode, "_backend", Backend())
    prompt = "<|im_start|>user\nWhich is red?<|im_end|>\n<|im_start|>assistant\n"
    for text in (prompt, f"{prompt}A rose.<|im_end|>\n", f"{prompt}A frog.<|im_end|>\n"):
        assert encode(text) == encode_whole(tokenizer, text)
    assert asked == ["user\nWhich is red?", "\n", "assistant\n", "assistant\nA rose.", "assistant\nA frog."]
