"""Open what a user calls a model, ready to answer: a run, a checkpoint, an adapter, a model's folder or a hub name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, chat_tokenizer_of
from uft_ds.errors import UserError
from uft_ds.export.unmerged import opened_unmerged
from uft_ds.host.callbacks import Say


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and chat template, in evaluation mode.

    name: of the run or folder. identity: all of the model that its answers depend on, by content, as `Unmerged` has it.
    """

    model: Any
    chat: ChatTokenizer
    name: str
    identity: Mapping[str, Any]


def open_subject(
    source: str, *, base: str | None = None, chat_template: Path | None = None, say: Say = lambda text: None
) -> Subject:
    """Load a model for generation: bfloat16 on a GPU, float32 on the CPU if there is none.

    An adapter stays an adapter, by PEFT: what answers is exactly what was trained, without a merge's rounding.

    Args:
        source: a run (its newest checkpoint), one of its checkpoints, an adapter, a whole model's folder, or a hub
            name.
        base: of an adapter or run whose base has moved.
        chat_template: a file in place of the model's own template.
    Raises:
        UserError: there is no such model, or it cannot answer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with opened_unmerged(source, base, say, chat_template=chat_template) as found:
        try:
            chat = chat_tokenizer_of(found.tokenizer, revision=found.revision)
        except UserError as error:
            given = source if chat_template is None else f"--chat-template: {chat_template}"
            raise UserError(f"{given}: {error}") from None
        return Subject(found.load(dtype, device), chat, found.name, found.identity())
