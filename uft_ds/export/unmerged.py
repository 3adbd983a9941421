"""A run's checkpoint, an adapter or a whole model as one model in memory: the base with its adapter on top, not merged.

The base keeps its whole vocabulary. Loaders that cut it to the tokenizer's length (lm-evaluation-harness's, where an
adapter is given) make the base and the result models of other sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uft_ds.architectures.facts import most_positions
from uft_ds.checkpoint.folder import step_of
from uft_ds.checkpoint.manifest import MANIFEST
from uft_ds.data.tokens.chat_tokenizer import checked_tokenizer, set_template, vocabulary_of
from uft_ds.errors import UserError
from uft_ds.export.convert import tokenizer_of
from uft_ds.export.deepspeed_files import is_deepspeed
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.source import Convertible, opened
from uft_ds.export.streamed_logps import with_adapter
from uft_ds.host.callbacks import Say
from uft_ds.streams.adapter_files import is_adapter
from uft_ds.streams.adapters import lora_form
from uft_ds.streams.identity import adapter_identity, base_identity, local_folder
from uft_ds.streams.load import check_base, check_base_files, embedding_rows, load_weights
from uft_ds.streams.nf4 import NF4, Nf4Base, quantise, round_linear


@dataclass(frozen=True)
class Unmerged:
    """What a path or a hub name stands for.

    base: a folder or a hub name. adapter: a folder in PEFT's format; None for a whole model. run: its folder, and step:
    of its checkpoint, where the source is a run's. nf4: the base in NF4 that the adapter was trained on.
    """

    name: str
    base: str
    revision: str | None
    adapter: Path | None
    tokenizer: Any
    run: Path | None = None
    step: int | None = None
    nf4: Nf4Base | None = None

    def identity(self) -> dict[str, Any]:
        """What the answers depend on, by content: hashes of weights, config, adapter, tokenizer and template."""
        with _in_words(self.base):
            of_base = base_identity(self.base, self.revision)
        return {
            "base_weights": of_base["weights"],
            "base_config": of_base["config"],
            **({} if self.nf4 is None else {"base_quantization": f"{NF4}, {self.nf4.dtype}"}),
            "adapter": None if self.adapter is None else adapter_identity(self.adapter, "adapter"),
            "tokenizer": _digest(vocabulary_of(self.tokenizer)),
            "special_tokens": _digest(json.dumps(self.tokenizer.special_tokens_map, sort_keys=True)),
            "chat_template": _digest(json.dumps(self.tokenizer.chat_template, sort_keys=True)),
        }

    def origin(self) -> dict[str, Any]:
        """Where it came from, to look at: a copied or moved model has the same identity."""
        return {"base": self.base, "revision": self.revision, "step": self.step}

    def positions(self) -> int | None:
        """How many tokens a sequence may have; None: any number."""
        return most_positions(check_base(self.base, self.revision))

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model on a device, in evaluation mode; the base's weights in `dtype`, an adapter's in float32.

        An adapter is computed as it was trained, beside the base's weights and not rounded to their type. A base in NF4
        stays in 4 bits in the type that it was trained in, and has the same rounded weights in another.

        Raises:
            UserError: it cannot be loaded, or the tokenizer has tokens that the model has no rows for.
        """
        with _in_words(self.base):
            check_base_files(local_folder(self.base, self.revision))
            model = self._loaded(dtype)
        rows = embedding_rows(model.config)
        if len(self.tokenizer) > rows:
            raise UserError(
                f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens and the model's embedding {rows} rows; "
                "take the tokenizer of this model"
            )
        if self.adapter is not None:
            model = with_adapter(model, self.adapter).get_base_model()
        torch.nn.Module.to(model, device)  # in place; transformers' own `to` is untyped for a device
        return model.eval()

    def _loaded(self, dtype: torch.dtype) -> Any:
        """The base, on the host."""
        nf4 = self.nf4
        if nf4 is None or dtype == nf4.dtype:
            model = load_weights(self.base, revision=self.revision, dtype=dtype)
            if nf4 is not None:
                quantise(model)
            return model
        # Of all bits that are stored: codes are made of the values in the type that was trained in.
        model = load_weights(self.base, revision=self.revision, dtype=torch.float32)
        round_linear(model, nf4)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


@contextmanager
def opened_unmerged(
    source: str, base: str | None, say: Say = lambda text: None, *, chat_template: Path | None = None
) -> Iterator[Unmerged]:
    """What `source` stands for: a run, a checkpoint, an adapter, a model's folder, or a hub model.

    The tokenizer and its chat template are the run's, else those beside the adapter, else the base's.

    Args:
        base: the base where the source does not say it or it has moved; refused for a whole model.
        chat_template: a file in place of that template. A run's own is compared with what it was trained with before.
    Raises:
        UserError: it is nothing of the kind, or a reward model, which answers nothing.
    """
    path = Path(source)
    if (path / "config.json").is_file() or not path.exists():
        if base is not None:
            raise UserError(f"--base: {source} is a whole model, which has no other base; leave --base out")
        with _in_words(source):
            check_base(source, None)
            tokenizer = checked_tokenizer(source)
        found = Unmerged(path.resolve().name if path.exists() else path.name, source, None, None, tokenizer)
        yield _with_template(found, chat_template)
        return
    is_own = (path / MANIFEST).exists() or (path / "checkpoints").is_dir()
    if path.is_dir() and not is_own and is_deepspeed(path) and not is_adapter(path):
        raise UserError(
            f"{source}: a DeepSpeed checkpoint of another program; convert it first with uft convert {source} FOLDER "
            "--to adapter --base BASE --adapter-config FILE, and give that FOLDER"
        )
    with opened(path, base, None, say) as convertible:
        if convertible.is_reward_model:
            raise UserError(f"{source}: a reward model, which gives rewards and no answers; it cannot be asked")
        yield _with_template(_of_adapter(path, convertible), chat_template)


def _of_adapter(path: Path, found: Convertible) -> Unmerged:
    read_low_rank(found.adapter)  # an adapter that PEFT would load as none is refused
    if found.run is not None:
        lora_form(found.adapter, "adapter")
        run, step, tokenizer = found.run.path, step_of(found.path), tokenizer_of(found).tokenizer
        name = f"{run.resolve().name} step {step}"
        return Unmerged(name, found.base, found.revision, found.adapter, tokenizer, run, step, found.nf4)
    with _in_words(found.base):
        has_own = (path / "tokenizer_config.json").is_file()
        tokenizer = checked_tokenizer(str(path)) if has_own else checked_tokenizer(found.base, revision=found.revision)
    return Unmerged(path.resolve().name, found.base, found.revision, found.adapter, tokenizer, nf4=found.nf4)


def _with_template(found: Unmerged, chat_template: Path | None) -> Unmerged:
    if chat_template is not None:
        with _in_words(found.base):
            set_template(found.tokenizer, str(chat_template))
    return found


@contextmanager
def _in_words(base: str) -> Iterator[None]:
    """Within the block, what a message calls by a recipe's key has the command's words: there is no recipe."""
    try:
        yield
    except UserError as error:
        reason = str(error)
        if reason.startswith("model.chat_template:"):
            raise UserError(reason.replace("model.chat_template:", "--chat-template:", 1)) from None
        reason = reason.removeprefix("model.base: ")
        raise UserError(f"`{base}` cannot be loaded as a model: {reason}") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
