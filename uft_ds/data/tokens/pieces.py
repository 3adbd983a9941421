"""Hold a tokenizer that transformers makes of a SentencePiece model alone against SentencePiece itself.

Where a folder has `tokenizer.model` and no `tokenizer.json`, transformers 5 converts the model when it loads it. It may
get another order of merges and no space before the text: Mistral's `[INST]` begins with `[` then, not with `▁[`, which
the model was trained on. Nothing fails; the prompts are other ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from uft_ds.errors import UserError

_PROBES = (
    "[INST] What is asked? [/INST]",
    "Hello world",
    "two  spaces,   three\n\nand an empty line",
    "  indented\n    return x[0] + 3.14",
    "Zürich, 東京, naïve — “quoted” 😀",
    "1234567890 + 42 = <answer>",
)
"""Text on which a wrong space before the text, a wrong order of merges and wrong bytes all show."""


def check_pieces(base: str, tokenizer: Any, model: Path) -> None:
    """Refuse a tokenizer whose ids are not those of its SentencePiece model.

    Args:
        tokenizer: as transformers loaded it.
        model: the file `tokenizer.model`; one that is not SentencePiece's (tiktoken's) is not compared.
    Raises:
        UserError: names a text and both lists of tokens, and what to do.
    """
    try:
        pieces = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        return
    for text in _PROBES:
        ours, theirs = list(tokenizer(text, add_special_tokens=False)["input_ids"]), pieces.encode(text)
        if ours != theirs:
            shared = [one == other for one, other in zip(ours, theirs, strict=False)]
            at = shared.index(False) if False in shared else len(shared)
            found = tokenizer.convert_ids_to_tokens(ours[at : at + 3])
            expected = [pieces.id_to_piece(index) for index in theirs[at : at + 3]]
            raise UserError(
                f"model.base: {base}: has tokenizer.model and no tokenizer.json, and transformers makes another "
                f"tokenizer of it: in {text!r} it finds {found} at token {at}, SentencePiece finds {expected}; put the "
                "model's own tokenizer.json into its folder (from the model's page, or by save_pretrained of its fast "
                "tokenizer in transformers 4)"
            )
