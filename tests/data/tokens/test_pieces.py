"""A SentencePiece model alone: what transformers makes of it is held against SentencePiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny import build_tiny_tokenizer

from uft_ds.data.tokens.chat_tokenizer import open_tokenizer
from uft_ds.data.tokens.pieces import check_pieces
from uft_ds.errors import UserError

TEXT = "the quick brown [INST] fox [/INST] jumps over  two   lazy dogs and returns x[0] + 3.14 to the world"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of byte pairs that puts a space before a text, as Mistral's and Llama 2's do."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, *TEXT.split()] * 20), model_writer=written, vocab_size=330, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    return folder / "tokenizer.model"


class AsSentencePiece:
    """A tokenizer that gives a SentencePiece model's own ids."""

    def __init__(self, model: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(model))

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": self.pieces.encode(text)}


def test_other_ids_than_sentencepieces_are_refused(model: Path) -> None:
    """By the folder, a text and both tokens; the space before the text is missing (transformers 5.23)."""
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(model.parent))
    message = str(caught.value)
    assert message.startswith(f"model.base: {model.parent}: has tokenizer.model and no tokenizer.json")
    assert "'[INST] What is asked? [/INST]'" in message
    assert "SentencePiece finds ['▁['" in message


def test_sentencepieces_own_ids_are_right(model: Path) -> None:
    """A tokenizer that agrees passes, and a file that is none of SentencePiece's is not compared."""
    tokenizer = AsSentencePiece(model)
    check_pieces("base", tokenizer, model)
    model.write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes it
    check_pieces("base", tokenizer, model)


def test_the_models_own_tokenizer_json_is_taken(model: Path) -> None:
    """Beside it the SentencePiece model is not read."""
    build_tiny_tokenizer(model.parent)
    assert open_tokenizer(str(model.parent)).end_of_turn == "<|im_end|>"
