"""The tokenizer by which a run reads its data, which depends on the base's config too."""

from __future__ import annotations

from uft_ds.architectures.facts import placeholder_ids
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, with_placeholders
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.streams.load import check_base


def data_tokenizer(base: str, *, revision: str | None = None, chat_template: str | None = None) -> ChatTokenizer:
    """As `load_tokenizer`; of a model of images and text it knows the tokens that stand for images.

    Raises:
        UserError: as `load_tokenizer`, or the base has no config that can be read.
    """
    config = check_base(base, revision)
    chat = load_tokenizer(base, revision=revision, chat_template=chat_template)
    return with_placeholders(chat, placeholder_ids(config))
