"""The padding token of a reward model.

transformers' sequence classifiers read the last token that is not the padding token. A score is read at the token that
ends the assistant's turn, so that one must not be the padding token, as it is in many tokenizers.
"""

from __future__ import annotations

from uft_ds.data.tokens.chat_template import special_tokens
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
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
