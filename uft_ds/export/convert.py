"""`uft convert`: write a trained adapter, a merged model or a universal checkpoint, and verify a merge.

A source is a run, one of its checkpoints, an adapter in PEFT's format, or a folder that DeepSpeed's
`engine.save_checkpoint` has written (see `source.py`). The target appears only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from uft_ds.architectures.facts import adapts_experts, names_with_experts
from uft_ds.checkpoint.folder import OPTIMIZER
from uft_ds.checkpoint.shards import Shards
from uft_ds.data.example import Sequence
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, save_tokenizer
from uft_ds.data.tokens.padding import save_for_scoring
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.data.tokens.vocabulary import check_fits_embedding
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.agreement import (
    MAX_RELATIVE_ERROR,
    Agreement,
    compare,
    sample_sequences,
    sequences_of_run,
)
from uft_ds.export.deepspeed_files import is_deepspeed
from uft_ds.export.low_rank import ExpertsLowRank, LowRank, read_low_rank
from uft_ds.export.merge import write_merged
from uft_ds.export.model_card import FOR_REWARDS, model_card
from uft_ds.export.quantised import write_mark
from uft_ds.export.source import Convertible, of_run, opened, recorded_identity
from uft_ds.export.universal import write_universal
from uft_ds.export.whole import Written, check_written, write_whole
from uft_ds.host.callbacks import OnProgress, Say
from uft_ds.host.files import sync
from uft_ds.host.locks import Held, acquire
from uft_ds.streams.base_weights import base_weights
from uft_ds.streams.experts import without_wrappers
from uft_ds.streams.identity import local_folder
from uft_ds.streams.load import auto_class, check_base, check_base_files, config_of_folder, embedding_rows
from uft_ds.streams.stored_names import stored_experts, stored_parameters, stored_weights
from uft_ds.streams.tied import stored_twice
from uft_ds.streams.weight_files import WeightFiles

Dtype = Literal["float32", "bfloat16", "float16"]
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    agreement: of the merged model with the adapter. written: of a model of which all parameters were trained. None if
    nothing was compared.
    """

    folder: Path
    source: Path
    agreement: Agreement | None
    written: Written | None = None

    @property
    def checked(self) -> str:
        """What was compared, and how it came out, as a part of a sentence."""
        found = self.agreement or self.written
        return "not compared with what was trained" if found is None else found.summary


@dataclass(frozen=True)
class StoredAs:
    """How merged weights are stored.

    dtype: type of all weights; None: each keeps the type that the base stores it in.
    max_shard_bytes: largest size of one file.
    """

    dtype: Dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


AS_THE_BASE = StoredAs()

_OF_IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files by which transformers makes a wrapper's inputs of images, beside the tokenizer's."""

_NOT_UNIVERSAL = "it is not written as a universal checkpoint; its own checkpoints resume on any number of ranks"


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

    Of a run on a base in NF4, the base is the rounded one that was trained on.

    Sums are formed in float32 and stored in the base's types, tensor by tensor. Of a run that trains all parameters,
    the float32 values are stored so.

    Args:
        base, adapter_config: needed for a DeepSpeed folder, which names neither; `base` also replaces the base that
            an adapter's config names.
        stored: type and file size of the merged weights.
    Raises:
        UserError: there is nothing to convert, the adapter is not a plain LoRA, or `out` is not empty.
        CheckFailed: the merged model has lost what was trained; nothing is left at `out`.
    """
    out = out.absolute()
    check_free(out)
    with opened(path, base, adapter_config, say, takes_whole=True) as source:
        if source.trains_all:
            return _whole(source, out, stored, verify, say, on_progress)
        if source.is_reward_model:
            raise UserError(
                f"{path}: a reward model, which generates nothing; take --to reward-model, or --to adapter for PEFT"
            )
        folder = local_folder(source.base, source.revision)
        model, empty = check_base_files(folder)
        deltas, is_untied = stored_deltas(folder, model, empty, read_low_rank(source.adapter))
        chat = tokenizer_of(source)
        sequences = sequences_of(source, chat)
        rows = embedding_rows(config_of_folder(folder))
        check_fits_embedding(chat, rows, (sequence.token_ids_T for sequence in sequences))
        say(f"merging {source.path} with its base {source.base}, which is only read")
        with whole_or_nothing(out) as temporary:
            target = None if stored.dtype is None else getattr(torch, stored.dtype)
            write_merged(
                base_weights(folder, source.nf4),
                deltas,
                temporary,
                dtype=target,
                max_shard_bytes=stored.max_shard_bytes,
                on_bytes=partial(on_progress, "writing weights"),
            )
            _write_configs(folder, temporary, chat, dtype=stored.dtype, untie=is_untied)
            found = None
            if verify:
                say("comparing the merged model with the adapter, layer by layer")
                on_unit = partial(on_progress, "comparing layers")
                found = compare(folder, source.adapter, temporary, sequences, on_unit, nf4=source.nf4)
                check_faithful(found, stored.dtype)
            card = model_card(source.base, source.settings, found, title=out.name, nf4=source.nf4)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, found)


def _whole(
    source: Convertible, out: Path, stored: StoredAs, verify: bool, say: Say, on_progress: OnProgress
) -> Conversion:
    """Write the model of a run that trains all parameters."""
    folder = local_folder(source.base, source.revision)
    model, empty = check_base_files(folder)
    names, shards = stored_parameters(folder, model, empty), Shards(source.path / OPTIMIZER)
    chat, base = tokenizer_of(source), WeightFiles(folder)
    say(f"writing the model of {source.path}; its base {source.base} is only read")
    with whole_or_nothing(out) as temporary:
        write_whole(
            base,
            names,
            shards,
            temporary,
            dtype=None if stored.dtype is None else getattr(torch, stored.dtype),
            max_shard_bytes=stored.max_shard_bytes,
            on_bytes=partial(on_progress, "writing weights"),
        )
        _write_configs(folder, temporary, chat, dtype=stored.dtype, untie=False)
        found = None
        if verify:
            say("reading the model back")
            found = check_written(temporary, base, names, shards, partial(on_progress, "comparing parameters"))
        card = model_card(source.base, source.settings, found, title=out.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, None, found)


def convert_to_adapter(
    path: Path, out: Path, *, base: str | None = None, adapter_config: Path | None = None, say: Say = print
) -> Conversion:
    """Write the adapter in PEFT's format, with tokenizer and model card if the source is a run.

    Raises:
        UserError: there is nothing to convert, the adapter is not a plain LoRA, or `out` is not empty.
    """
    out = out.absolute()
    check_free(out)
    with (
        opened(path, base, adapter_config, say, reads_weights=False) as source,
        whole_or_nothing(out) as temporary,
    ):
        if source.run is None:
            read_low_rank(source.adapter)  # an adapter that PEFT would load as none, or not at all, is not copied
        shutil.copytree(source.adapter, temporary, dirs_exist_ok=True)
        if source.nf4 is not None:
            write_mark(temporary, source.nf4)
        if source.settings is not None:
            (save_for_scoring if source.is_reward_model else save_tokenizer)(tokenizer_of(source), temporary)
            loaded_as = None if source.nf4 is None else _loaded_as(source)
            card = model_card(source.base, source.settings, None, title=out.name, nf4=source.nf4, loaded_as=loaded_as)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, None)


def _loaded_as(source: Convertible) -> str:
    """The name of the class of transformers that loads the base of an adapter."""
    if source.is_reward_model:
        return FOR_REWARDS
    return str(auto_class(check_base(source.base, source.revision)).__name__)


def convert_to_universal(path: Path, out: Path, *, say: Say = print) -> Conversion:
    """Write a run's checkpoint as a universal checkpoint of DeepSpeed: adapter and optimiser, for any number of ranks.

    Raises:
        UserError: the path holds no checkpoint of a run, or `out` is not empty.
    """
    out = out.absolute()
    check_free(out)
    if is_deepspeed(path):
        raise UserError(f"{path}: DeepSpeed's own; `python -m deepspeed.checkpoint.ds_to_universal` converts it")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter alone; a universal checkpoint is of a run, which has the optimiser's state"
        )
    source = of_run(path, say=say, reads_weights=False)
    assert source.settings is not None
    if source.trains_all:
        raise UserError(f"{path}: all parameters were trained: {_NOT_UNIVERSAL}")
    if source.is_reward_model:
        raise UserError(f"{path}: a reward model, whose head has a learning rate of its own: {_NOT_UNIVERSAL}")
    if source.nf4 is not None:
        say("note: the adapter belongs on its base in NF4, as its run's recipe says; the checkpoint holds no base")
    with whole_or_nothing(out) as temporary:
        write_universal(source.path, source.settings.train, temporary)
    return Conversion(out, source.path, None)


def stored_deltas(
    folder: Path, model: Any, empty: Mapping[str, Tensor], deltas: Mapping[str, LowRank | ExpertsLowRank]
) -> tuple[dict[str, LowRank], bool]:
    """The deltas by the names that the base's files use, and whether one of them parts the head from the embedding.

    Args:
        model: of the base in `folder`, on the meta device. empty: as `check_base_files` returns them.
    Raises:
        UserError: the files lack a weight that the adapter changes, or hold it in several tensors.
    """
    plain = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
    names = stored_weights(folder, model, empty, plain)
    by_file = {names[name]: delta for name, delta in plain.items()}
    of_experts = {
        _expert_weight(folder, model, name, delta): delta
        for name, delta in deltas.items()
        if isinstance(delta, ExpertsLowRank)
    }
    for name, pieces in stored_experts(folder, model, empty, of_experts).items():
        by_file |= {piece.name: of_experts[name].of(piece.expert, piece.rows) for piece in pieces}
    return by_file, any(name in by_file for pair in stored_twice(model, empty) for name in pair)


def _expert_weight(folder: Path, model: Any, name: str, delta: ExpertsLowRank) -> str:
    """The weight of a module of experts that a delta is of: the one that has its shape.

    Raises:
        UserError: there is none, or adapters of this model's experts are not known to be merged.
    """
    module = without_wrappers(name.removesuffix(".weight"))
    if not adapts_experts(model.config):
        raise UserError(
            f"{folder}: the adapter changes {module}, and adapters of the experts of {type(model).__name__} have not "
            f"been shown to be merged (shown: {', '.join(names_with_experts())})"
        )
    weights = [
        weight
        for weight, parameter in model.named_parameters()
        if weight.rpartition(".")[0] == module and parameter.shape == delta.shape
    ]
    if len(weights) != 1:
        raise UserError(
            f"{folder}: {module} has no weight of shape {list(delta.shape)}, which the adapter is for; it is of "
            "another model"
        )
    return weights[0]


def tokenizer_of(source: Convertible) -> ChatTokenizer:
    """The tokenizer of the source's base, with the run's chat template.

    Raises:
        UserError: it cannot be loaded, or a run was trained with another one.
    """
    chat = load_tokenizer(source.base, revision=source.revision, chat_template=source.chat_template)
    if source.run is not None and chat.content_hash != recorded_identity(source.run)[1]:
        key = f"model.chat_template: {source.chat_template}" if source.chat_template else f"model.base: {source.base}"
        raise UserError(
            f"{key}: the tokenizer or its chat template is not the one that the run was trained with, by its content; "
            f"bring the former files back (or install the versions in {source.run.environment})"
        )
    return chat


def sequences_of(source: Convertible, chat: ChatTokenizer) -> tuple[Sequence, ...]:
    """The sequences on which a conversion is compared: of the run's data, or built-in ones."""
    return sample_sequences(chat) if source.run is None else sequences_of_run(source.run.sample_data())


def check_faithful(found: Agreement, dtype: Dtype | None) -> None:
    """Refuse a model that does not do what base and adapter do.

    Raises:
        CheckFailed: says how much is kept, and what to do.
    """
    if not found.is_faithful:
        raise CheckFailed(
            f"the merged model: {found.summary} (allowed {MAX_RELATIVE_ERROR:.0%}): weights of "
            f"{dtype or 'the type of the base'} cannot hold so small a change; convert with --dtype float32, or take "
            "the adapter by --to adapter"
        )


def check_free(out: Path) -> None:
    """Refuse a target that holds something.

    Raises:
        UserError: it exists, and is no empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; delete it or give another folder")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` if the block succeeds, and deleted otherwise.

    Remains of an earlier conversion that was killed are deleted first.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            check_free(out)  # again: another conversion may have ended in the meantime
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
        UserError: another conversion is writing it.
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


def _write_configs(base: Path, folder: Path, chat: ChatTokenizer, *, dtype: Dtype | None, untie: bool) -> None:
    """Write config.json, generation_config.json and the tokenizer.

    untie: the merged head and embedding differ, so the config must not make them one.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # the older name of the same key
    config["use_cache"] = True
    if untie:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in config.get("text_config", {}):
            config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(base)
    else:
        generation = GenerationConfig.from_model_config(check_base(str(base), None))
    # Not save_pretrained: it refuses configs of well-known models, such as a temperature without do_sample.
    _ending_turns(generation, chat).to_json_file(folder / "generation_config.json")
    save_tokenizer(chat, folder)
    for name in _OF_IMAGES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _ending_turns(config: GenerationConfig, chat: ChatTokenizer) -> GenerationConfig:
    """The config with the template's end of turn as the first end token: base models stop at the end of a text only."""
    own = config.eos_token_id
    others = [] if own is None else own if isinstance(own, list) else [own]
    config.eos_token_id = [chat.end_of_turn_id, *(token for token in others if token != chat.end_of_turn_id)]
    if config.pad_token_id is None:
        pad = chat.tokenizer.pad_token_id
        config.pad_token_id = chat.end_of_turn_id if pad is None else pad
    return config
