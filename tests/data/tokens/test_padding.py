"""The tokenizer of a reward model: padding is never what ends an answer, and its texts end with the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import END_OF_TEXT, IM_END, IM_START, build_tiny_tokenizer
from transformers import AutoTokenizer

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.padding import padding_id, save_for_scoring
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def chat(tmp_path: Path) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path / "tokenizer")))


def test_padding_is_another_special_token(chat: ChatTokenizer) -> None:
    """Its own if that does not end the turn, the one named for it, the unknown token, and bos at the last."""
    assert chat.tokenizer.pad_token_id == chat.end_of_turn_id == IM_END
    assert padding_id(chat) == END_OF_TEXT, "not the bos token"
    chat.tokenizer.unk_token = "<|im_start|>"
    assert padding_id(chat) == IM_START
    chat.tokenizer.unk_token = None
    chat.tokenizer.pad_token = "<|im_start|>"
    assert padding_id(chat) == IM_START
    chat.tokenizer.pad_token = "<|im_end|>"
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>", "<|right_pad|>"]})
    assert padding_id(chat) == chat.tokenizer.convert_tokens_to_ids("<|right_pad|>")


def test_a_tokenizer_whose_one_special_token_ends_the_turn_is_refused(chat: ChatTokenizer) -> None:
    alone = replace(chat, tokenizer=_OneSpecialToken())
    with pytest.raises(UserError, match="no special token but '<end>', which ends every answer"):
        padding_id(alone)


class _OneSpecialToken:
    """As GPT-2's tokenizer."""

    name_or_path, added_tokens_decoder = "one", {}
    all_special_tokens, all_special_ids = ["<end>"], [IM_END]

    def convert_ids_to_tokens(self, index: int) -> str:
        return "<end>"


def test_a_saved_tokenizer_pads_and_ends_its_texts_for_a_classifier(chat: ChatTokenizer, tmp_path: Path) -> None:
    """Loaded by transformers alone. A prompt for an answer is what it was."""
    save_for_scoring(chat, tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.pad_token_id == END_OF_TEXT
    ids = loaded.apply_chat_template(CONVERSATION)["input_ids"]
    assert ids[-1] == IM_END
    own = chat.tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    assert ids == own[:-1], "the template writes a line break after the answer"
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": True, "continue_final_message": False}):
        found, expected = (t.apply_chat_template(CONVERSATION[:1], **options) for t in (loaded, chat.tokenizer))
        assert found["input_ids"] == expected["input_ids"]
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
