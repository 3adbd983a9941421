"""Open what a user calls a model, ready to answer: a run, a checkpoint, an adapter, a model's folder or a hub name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uft_ds.checkpoint.folder import step_of
from uft_ds.data.tokens.chat_template import template_of
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, open_tokenizer
from uft_ds.errors import UserError
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.source import opened
from uft_ds.export.streamed_logps import with_adapter
from uft_ds.host.callbacks import Say
from uft_ds.streams.identity import adapter_identity, base_identity, local_folder
from uft_ds.streams.load import check_base, check_base_files, load_weights


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and chat template, in evaluation mode.

    name: of the run or folder. identity: all that its answers depend on besides how they are drawn, as plain values:
    hashes of the base's weights, of the adapter, and of the tokenizer with its template; type of numbers and device.
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
    path = Path(source)
    template = None if chat_template is None else str(chat_template)
    if not path.exists() or (path / "config.json").is_file():
        if base is not None:
            raise UserError(f"--base: of no use with {source}, which is a whole model; leave it out")
        return _subject(source, None, template, name=path.name, adapter=None)
    with opened(path, base, None, say) as found:
        if found.is_reward_model:
            raise UserError(f"{source}: a reward model, which gives no answers; expected a model that was tuned to")
        read_low_rank(found.adapter)  # one that PEFT would load as none, or not at all, is refused
        name = path.resolve().name
        if found.run is not None:
            name = f"{found.run.path.resolve().name} step {step_of(found.path)}"
        template = template if template is not None else found.chat_template
        return _subject(found.base, found.revision, template, name=name, adapter=found.adapter)


def _subject(base: str, revision: str | None, template: str | None, *, name: str, adapter: Path | None) -> Subject:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        check_base(base, revision)
        chat = open_tokenizer(base, revision=revision, chat_template=template)
        check_base_files(local_folder(base, revision))
        model = load_weights(base, revision=revision, dtype=dtype)
        of_base = base_identity(base, revision)
    except UserError as error:
        reason = str(error).removeprefix("model.base: ").replace("model.chat_template:", "--chat-template:")
        raise UserError(f"`{base}` cannot be loaded as a model: {reason}") from None
    if adapter is not None:
        model = with_adapter(model, adapter).get_base_model()
    torch.nn.Module.to(model, device)  # in place; transformers' own `to` is untyped for a device
    identity = {
        "base_weights": of_base["weights"],
        "base_config": of_base["config"],
        "adapter": None if adapter is None else adapter_identity(adapter),
        "tokenizer": chat.content_hash,
        "template": hashlib.sha256(template_of(chat.tokenizer).encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    return Subject(model.eval(), chat, name, identity)
