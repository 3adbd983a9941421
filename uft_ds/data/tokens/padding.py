"""The tokenizer of a reward model: its padding token, and where its texts end.

transformers' sequence classifiers read the last token that is not the padding token. A score is read at the token that
ends the assistant's turn, so that one must not be the padding token, as it is in many tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

from uft_ds.data.tokens.chat_template import special_tokens, template_of
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, read_tokenizer, save_tokenizer, vocabulary_of
from uft_ds.errors import UserError


def padding_id(chat: ChatTokenizer) -> int:
    """A special token that does not end the assistant's turn.

    The tokenizer's own if it is such a one; else one that is named for it, the unknown token, or any other, of which
    the one that begins a text comes last.

    Raises:
        UserError: every special token ends the assistant's turn.
    """
    tokenizer = chat.tokenizer
    known = {index: text for text, index in special_tokens(tokenizer).items() if index != chat.end_of_turn_id}
    if not known:
        raise UserError(
            f"objective.reward: head: the tokenizer of {tokenizer.name_or_path} has no special token but "
            f"{chat.end_of_turn!r}, which ends every answer and so cannot be the padding token of a reward model; add "
            "one to the tokenizer of model.base (and a row to its embedding)"
        )

    def rank(index: int) -> tuple[bool, bool, bool, bool, int]:
        is_own, is_unknown = index == tokenizer.pad_token_id, index == tokenizer.unk_token_id
        return not is_own, "pad" not in known[index].lower(), not is_unknown, index == tokenizer.bos_token_id, index

    return min(known, key=rank)


def save_for_scoring(chat: ChatTokenizer, folder: Path) -> None:
    """Save a tokenizer with the padding token of a reward model, and a template that ends with the answer.

    Many templates write a line break after the token that ends the assistant's turn. A classifier would read its score
    there, where none was trained, so the saved template leaves it out.
    """
    save_tokenizer(chat, folder)
    pad = chat.tokenizer.convert_ids_to_tokens(padding_id(chat))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8")) | {"pad_token": pad}
            path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(ending_with_answer(template_of(chat.tokenizer)), encoding="utf-8")


def is_saved_for_scoring(chat: ChatTokenizer, folder: Path) -> bool:
    """Whether a folder's tokenizer and template are the given ones, as they are or as `save_for_scoring` writes them.

    Raises:
        UserError: the folder holds no tokenizer that can be read.
    """
    read_tokenizer(str(folder), local_files_only=True)  # its checks: some classes open a folder without a vocabulary
    # By the class of the given one. transformers finds the class in config.json, which an adapter's folder lacks, and
    # some classes, such as Qwen2's, read the same files as another normaliser.
    theirs = type(chat.tokenizer).from_pretrained(str(folder), local_files_only=True)
    own = template_of(chat.tokenizer)
    return vocabulary_of(theirs) == vocabulary_of(chat.tokenizer) and (
        theirs.chat_template in (own, ending_with_answer(own))
    )


def ending_with_answer(template: str) -> str:
    """The template, whose text of a finished conversation ends without white space."""
    ended = "{{ rendered if add_generation_prompt else rendered.rstrip() }}"
    return f"{{% set rendered %}}{template}{{% endset %}}{ended}"
