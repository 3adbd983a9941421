"""From what training leaves to what others load: an adapter in PEFT's format, or a whole model, checked.

A source is a run, one of its checkpoints, an adapter in PEFT's format, or a folder that DeepSpeed's
`engine.save_checkpoint` has written. Nothing is written at the target before it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from uft_ds.data.example import Sequence
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, save_tokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.agreement import (
    MAX_RELATIVE_ERROR,
    Agreement,
    compare,
    sample_sequences,
    sequences_of_run,
)
from uft_ds.export.deepspeed_files import is_deepspeed
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.merge import write_merged
from uft_ds.export.model_card import model_card
from uft_ds.export.source import Convertible, of_run, opened
from uft_ds.export.universal import write_universal
from uft_ds.host.callbacks import OnProgress, Say
from uft_ds.host.files import sync
from uft_ds.host.locks import Held, acquire
from uft_ds.streams.identity import local_folder
from uft_ds.streams.load import check_base, config_of_folder, meta_model
from uft_ds.streams.weight_files import WeightFiles
from uft_ds.streams.weights import check_weights

Dtype = Literal["float32", "bfloat16", "float16"]
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Conversion:
    """agreement: None where nothing was compared."""

    folder: Path
    source: Path
    agreement: Agreement | None


@dataclass(frozen=True)
class StoredAs:
    """How merged weights are stored.

    dtype: of all weights; None: each in the type that the base stores it in. max_shard_bytes: of one file, at most.
    """

    dtype: Dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


AS_THE_BASE = StoredAs()


def convert_to_merged(
    path: Path,
    out: Path,
    *,
    base: str | None = None,
    adapter_config: Path | None = None,
    stored: StoredAs = AS_THE_BASE,
    verify: bool = True,
    say: Say = print,
    on_progress: OnProgress = lambda label, done, total: None,
) -> Conversion:
    """Write base + adapter as one Hugging Face model: safetensors, tokenizer, chat template, generation config, card.

    Sums are formed in float32 and stored in the base's types, tensor by tensor.

    Args:
        base, adapter_config: of a DeepSpeed folder, which says neither; of an adapter, instead of what it says.
        stored: type and files of the merged weights.
    Raises:
        UserError: nothing to convert, an adapter that is no plain LoRA, or `out` holds something.
        CheckFailed: the merged model has lost what was trained; nothing is left at `out`.
    """
    out = out.absolute()
    _check_free(out)
    with opened(path, base, adapter_config, say) as source:
        deltas = read_low_rank(source.adapter)
        folder = local_folder(source.base, source.revision)
        check_weights(folder, meta_model(config_of_folder(folder)))
        chat = _tokenizer_of(source)
        say(f"merging {source.path} into {source.base}")
        with _whole_or_nothing(out) as temporary:
            target = None if stored.dtype is None else getattr(torch, stored.dtype)
            write_merged(
                WeightFiles(folder),
                deltas,
                temporary,
                dtype=target,
                max_shard_bytes=stored.max_shard_bytes,
                on_bytes=partial(on_progress, "writing weights"),
            )
            _write_configs(folder, temporary, chat, stored.dtype)
            found = None
            if verify:
                say("comparing the merged model with the adapter, layer by layer")
                sequences = _sequences(source, chat)
                found = compare(folder, source.adapter, temporary, sequences, partial(on_progress, "comparing layers"))
                _check_faithful(found, stored.dtype)
            card = model_card(source.base, source.settings, found, title=out.name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, found)


def convert_to_adapter(
    path: Path, out: Path, *, base: str | None = None, adapter_config: Path | None = None
) -> Conversion:
    """Write the adapter in PEFT's format, with the tokenizer where the source has one.

    Raises:
        UserError: nothing to convert, or `out` holds something.
    """
    out = out.absolute()
    _check_free(out)
    with opened(path, base, adapter_config) as source, _whole_or_nothing(out) as temporary:
        shutil.copytree(source.adapter, temporary, dirs_exist_ok=True)
        if source.settings is not None:
            save_tokenizer(_tokenizer_of(source), temporary)
            card = model_card(source.base, source.settings, None, title=out.name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, None)


def convert_to_universal(path: Path, out: Path) -> Conversion:
    """Write a run's checkpoint as DeepSpeed's universal one: adapter and optimiser, for any number of ranks.

    Raises:
        UserError: no checkpoint of ours, or `out` holds something.
    """
    out = out.absolute()
    _check_free(out)
    if is_deepspeed(path):
        raise UserError(f"{path}: DeepSpeed's own; `python -m deepspeed.checkpoint.ds_to_universal` converts it")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter alone; a universal checkpoint is of a run, which has the optimiser's state"
        )
    source = of_run(path)
    assert source.settings is not None
    with _whole_or_nothing(out) as temporary:
        write_universal(source.path, source.settings.train, temporary)
    return Conversion(out, source.path, None)


def _tokenizer_of(source: Convertible) -> ChatTokenizer:
    return load_tokenizer(source.base, revision=source.revision, chat_template=source.chat_template)


def _sequences(source: Convertible, chat: ChatTokenizer) -> tuple[Sequence, ...]:
    return sample_sequences(chat) if source.run is None else sequences_of_run(source.run.sample_data())


def _check_faithful(found: Agreement, dtype: Dtype | None) -> None:
    if not found.is_faithful:
        raise CheckFailed(
            f"the merged model: {found.summary} (allowed {MAX_RELATIVE_ERROR:.0%}): weights of "
            f"{dtype or 'the type of the base'} cannot hold so small a change; convert with --dtype float32, or take "
            "the adapter by --to adapter"
        )


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; delete it or give another folder")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the block, or goes; what a killed conversion left of it goes first."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            _check_free(out)  # again: another conversion may have ended in the meantime
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                for path in temporary.rglob("*"):
                    sync(path)
                if out.exists():
                    out.rmdir()
                temporary.rename(out)
                sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(temporary.parent):
            raise UserError(f"{error.filename}: {error.strerror}") from None
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Within the block no other conversion writes `out`, as far as the file system's locks reach.

    Raises:
        UserError: one does.
    """
    try:
        lock = acquire(out.with_name(f".{out.name}.lock"), needs_locks=False)
    except Held:
        message = f"{out}: another conversion is writing it; wait for its end, or give another folder"
        raise UserError(message) from None
    try:
        yield
    finally:
        lock.delete()


def _write_configs(base: Path, folder: Path, chat: ChatTokenizer, dtype: Dtype | None) -> None:
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # the same key's older name
    config["use_cache"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(base)
    else:
        generation = GenerationConfig.from_model_config(check_base(str(base), None))
    # Not save_pretrained: it refuses configs of well-known models, such as a temperature without do_sample.
    _ending_turns(generation, chat).to_json_file(folder / "generation_config.json")
    save_tokenizer(chat, folder)


def _ending_turns(config: GenerationConfig, chat: ChatTokenizer) -> GenerationConfig:
    """Base models stop at the end of a text only; a chat must stop at the end of a turn."""
    own = config.eos_token_id
    others = [] if own is None else own if isinstance(own, list) else [own]
    config.eos_token_id = [chat.end_of_turn_id, *(token for token in others if token != chat.end_of_turn_id)]
    if config.pad_token_id is None:
        pad = chat.tokenizer.pad_token_id
        config.pad_token_id = chat.end_of_turn_id if pad is None else pad
    return config
