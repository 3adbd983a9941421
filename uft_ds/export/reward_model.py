"""`uft convert --to reward-model`: write a reward model's run as Hugging Face's sequence classifier, and verify it.

Its one label is the reward. `AutoModelForSequenceClassification` loads it, and so do other trainers and servers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, read_tokenizer
from uft_ds.data.tokens.padding import padding_id, save_for_scoring
from uft_ds.data.tokens.vocabulary import check_fits_embedding
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.agreement import CHANGES_OF_REWARDS, Agreement, agreement
from uft_ds.export.convert import (
    AS_THE_BASE,
    Conversion,
    Dtype,
    StoredAs,
    check_faithful,
    check_free,
    sequences_of,
    stored_deltas,
    tokenizer_of,
    whole_or_nothing,
)
from uft_ds.export.low_rank import read_with_head
from uft_ds.export.merge import write_merged
from uft_ds.export.model_card import model_card
from uft_ds.export.source import opened
from uft_ds.export.streamed_logps import empty_model, num_units, streamed_scores, streamed_values, with_adapter
from uft_ds.host.callbacks import OnProgress, Say
from uft_ds.streams.adapter_files import HEAD_TENSOR, read_adapter_tensors
from uft_ds.streams.base_weights import base_weights
from uft_ds.streams.classifier import HEAD, empty_classifier
from uft_ds.streams.identity import local_folder
from uft_ds.streams.load import check_base, check_base_files, config_of_folder, embedding_rows
from uft_ds.streams.stored_names import origins
from uft_ds.streams.weight_files import WeightFiles

_TOKENS_AT_ONCE = 8192
"""Largest padded batch in which the written model is compared."""


def convert_to_reward_model(
    path: Path,
    out: Path,
    *,
    base: str | None = None,
    stored: StoredAs = AS_THE_BASE,
    verify: bool = True,
    say: Say = print,
    on_progress: OnProgress = lambda label, done, total: None,
) -> Conversion:
    """Write base + adapter + head as one sequence classifier of Hugging Face, with a tokenizer that pads for it.

    Args:
        base: where the run's base is now, if it has moved.
        stored: type and file size of the weights. Without a type, the base's weights keep theirs, the head its own.
    Raises:
        UserError: the source is not a reward model's run, or `out` is not empty.
        CheckFailed: the written model has lost what was trained; nothing is left at `out`.
    """
    out = out.absolute()
    check_free(out)
    with opened(path, base, None, say) as source:
        if not source.is_reward_model:
            raise UserError(
                f"{path}: not a run of objective.reward: head, so it holds no reward model; leave --to reward-model out"
            )
        folder = local_folder(source.base, source.revision)
        model, empty = check_base_files(folder)
        deltas, head = read_with_head(source.adapter)
        by_file, _ = stored_deltas(folder, model, empty, deltas)
        chat = tokenizer_of(source)
        sequences = sequences_of(source, chat)
        check_fits_embedding(
            chat, embedding_rows(config_of_folder(folder)), (sequence.token_ids_T for sequence in sequences)
        )
        say(f"merging {source.path} with its base {source.base}, which is only read")
        with whole_or_nothing(out) as temporary:
            write_merged(
                base_weights(folder, source.nf4),
                by_file,
                temporary,
                dtype=None if stored.dtype is None else getattr(torch, stored.dtype),
                max_shard_bytes=stored.max_shard_bytes,
                on_bytes=partial(on_progress, "writing weights"),
                without=_of_language_head(model, empty),
                added={f"{HEAD}.weight": head},
            )
            _write_configs(folder, temporary, chat, dtype=stored.dtype)
            found = None
            if verify:
                say("comparing the rewards of the written model with those of the adapter, layer by layer")
                on_unit = partial(on_progress, "comparing layers")
                weights = base_weights(folder, source.nf4)
                found = _compare(weights, source.adapter, temporary, _few(sequences), on_unit)
                check_faithful(found, stored.dtype)
            card = model_card(source.base, source.settings, found, title=out.name, nf4=source.nf4)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Conversion(out, source.path, found)


def _of_language_head(model: Any, empty: Mapping[str, Tensor]) -> set[str]:
    """The stored tensors of the base's own head, which a classifier does not have."""
    head = model.get_output_embeddings()
    names = {f"{name}.{own}" for name, module in model.named_modules() if module is head for own in ("weight", "bias")}
    return {stored for name, origin in origins(model, empty).items() if name in names for stored in origin.names}


def _write_configs(base: Path, folder: Path, chat: ChatTokenizer, *, dtype: Dtype | None) -> None:
    """Write config.json and the tokenizer, both with the padding token.

    Raises:
        CheckFailed: transformers reads another padding token from the written tokenizer.
    """
    given: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    pad = padding_id(chat)
    config = given | {
        "architectures": [type(empty_classifier(config_of_folder(base))).__name__],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad,
        "use_cache": False,
    }
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= {"pad_token_id": pad}
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)  # the older name of the same key
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_for_scoring(chat, folder)
    read = read_tokenizer(str(folder)).pad_token_id
    if read != pad:
        raise CheckFailed(f"the tokenizer: its padding token was written as {pad}, and is read as {read}")


def _few(sequences: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
    """The first sequences whose texts, padded to the longest, are no more tokens than may be forwarded at once."""
    kept: list[Sequence] = []
    for sequence in sequences:
        tried = [*kept, sequence]
        rows = sum(len(one.responses) for one in tried)
        if kept and rows * max(one.num_tokens for one in tried) > _TOKENS_AT_ONCE:
            break
        kept = tried
    return tuple(kept)


def _compare(
    weights: WeightFiles,
    adapter: Path,
    written: Path,
    sequences: tuple[Sequence, ...],
    on_unit: Callable[[int, int], None],
) -> Agreement:
    """Compare what the adapters change of each reward, by PEFT on the base and in the written model, in float32.

    PEFT's hidden states are read at the responses' last tokens by index; the classifier finds the tokens by itself.
    """
    with tempfile.TemporaryDirectory() as name:
        head = _split(adapter, Path(name))
        policy = with_adapter(empty_model(check_base(str(weights.folder), None)), Path(name))
        classifier = _empty(written)
        total, done = 2 * num_units(policy) + num_units(classifier), 0

        def count() -> None:
            nonlocal done
            done += 1
            on_unit(done, total)

        base_R = streamed_values(policy, weights, sequences, head, adapters=False, on_unit=count)
        adapter_R = streamed_values(policy, weights, sequences, head, on_unit=count)
    written_R = streamed_scores(classifier, WeightFiles(written), sequences, on_unit=count)
    on_unit(total, total)
    return agreement(adapter_R - base_R, written_R - base_R, CHANGES_OF_REWARDS)


def _empty(folder: Path) -> Any:
    """The classifier of a written folder without weights, whose buffers are allocated."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForSequenceClassification

    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForSequenceClassification.from_config(config_of_folder(folder))
    return model.requires_grad_(False).eval()


def _split(adapter: Path, folder: Path) -> Tensor:
    """Write a reward model's adapter without its head, as that of a causal model; returns the head, [1, hidden]."""
    tensors = read_adapter_tensors(adapter)
    head = tensors.pop(HEAD_TENSOR)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    plain = config | {"task_type": "CAUSAL_LM", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
    return head
