"""The tokenizer by which a run reads its data, which depends on the base's config too."""

from __future__ import annotations

from typing import Any

from uft_ds.architectures.facts import placeholder_ids
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, with_placeholders
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.recipe.settings import ModelSettings


def data_tokenizer(model: ModelSettings, config: Any) -> ChatTokenizer:
    """As `load_tokenizer`; of a model of images and text it knows the tokens that stand for images.

    Args:
        config: of the base.
    Raises:
        UserError: as `load_tokenizer`.
    """
    chat = load_tokenizer(model.base, revision=model.revision, chat_template=model.chat_template)
    return with_placeholders(chat, placeholder_ids(config))
