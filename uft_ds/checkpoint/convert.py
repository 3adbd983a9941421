"""From a run's checkpoint to a model that Hugging Face loads, checked against what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from uft_ds.checkpoint.save import latest_checkpoint
from uft_ds.data.chat_tokenizer import ChatTokenizer, save_tokenizer
from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.store import SequenceStore
from uft_ds.data.tokenize import load_tokenizer
from uft_ds.errors import CheckFailed, UserError
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.process import choose_accelerator
from uft_ds.recipe import Recipe
from uft_ds.recipe_file import load_recipe
from uft_ds.training.run_folder import RunFolder

MAX_RELATIVE_ERROR = 0.1
"""Root mean square error of the merged model's log-ratios, relative to their own root mean square."""

ROUNDING_NATS = 1e-4
"""An RMS error below this is float32's own rounding of log-probs, whatever was trained."""

SEQUENCES_CHECKED = 16


@dataclass(frozen=True)
class Conversion:
    """What was written, and how well it keeps what was trained.

    share_kept: regression of the merged model's log-ratios on the adapter's: 1 is perfect.
    relative_error: RMS error of the log-ratios over their RMS.
    """

    folder: Path
    checkpoint: Path
    num_responses: int
    share_kept: float
    relative_error: float


def convert_to_merged(
    run: Path, out: Path, *, dtype: str | None = None, report: Callable[[str], None] = print
) -> Conversion:
    """Write base + adapter as one Hugging Face model: safetensors, tokenizer, chat template, generation config.

    The sum is formed in float32. Log-ratios to the base, not log-probs, are then compared on the run's own
    sequences: rounding a small delta into bfloat16 weights can lose most of it, and log-probs would not show it.

    Args:
        dtype: `float32` or `bfloat16`; None: the recipe's.
    Raises:
        UserError: no valid checkpoint, or `out` holds something.
        CheckFailed: the merged model has lost what was trained; nothing is left at `out`.
    """
    out = out.absolute()
    checkpoint, folder, recipe = _open_run(run)
    _check_free(out)
    target_dtype = getattr(torch, dtype or recipe.model.dtype)
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    sequences = _sequences_to_check(folder, recipe)
    report(f"merging {checkpoint} into {recipe.model.base}")
    policy = PeftModel.from_pretrained(_load(recipe.model.base, recipe.model.revision), str(checkpoint / "adapter"))
    base_R = hugging_face_logps(policy, sequences, adapters=False)
    adapter_R = hugging_face_logps(policy, sequences) - base_R
    merged: Any = policy.merge_and_unload()
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_model(merged.to(target_dtype), chat, temporary)
        del merged, policy
        report("comparing the merged model with the adapter")
        merged_R = hugging_face_logps(_load(str(temporary), None), sequences) - base_R
        share_kept, relative_error = agreement(adapter_R, merged_R)
        if not relative_error <= MAX_RELATIVE_ERROR:
            raise CheckFailed(
                f"the merged model keeps {share_kept:.1%} of the adapter's log-ratios with a relative error of "
                f"{relative_error:.1%} (allowed {MAX_RELATIVE_ERROR:.0%}): {target_dtype} weights cannot hold so "
                "small a change; convert with --dtype float32, or take the adapter by --to adapter"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Conversion(out, checkpoint, len(adapter_R), share_kept, relative_error)


def convert_to_adapter(run: Path, out: Path) -> Path:
    """Copy the newest valid checkpoint's adapter, in PEFT's format, with the tokenizer.

    Raises:
        UserError: no valid checkpoint, or `out` holds something.
    """
    out = out.absolute()
    checkpoint, _, recipe = _open_run(run)
    _check_free(out)
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(checkpoint / "adapter", temporary)
        save_tokenizer(chat, temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def agreement(adapter_R: Tensor, merged_R: Tensor) -> tuple[float, float]:
    """(share kept, relative error) of the merged model's log-ratios; (1, 0) where there is nothing to keep."""
    power = adapter_R.square().sum()
    if power == 0:
        return (1.0, 0.0) if not merged_R.any() else (0.0, float("inf"))
    share = (adapter_R * merged_R).sum() / power
    error_R = merged_R - adapter_R
    if error_R.square().mean().sqrt() < ROUNDING_NATS:
        return float(share), 0.0
    return float(share), float(error_R.square().sum().div(power).sqrt())


def _open_run(run: Path) -> tuple[Path, RunFolder, Recipe]:
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; expected a run's folder or one of its checkpoints")
    checkpoint = latest_checkpoint(run)
    folder = RunFolder(checkpoint.parent.parent)
    if not folder.recipe.exists() or not folder.sample_data().exists():
        raise UserError(f"{folder.path}: no recipe.yaml or data/ beside {checkpoint.name}; a checkpoint needs its run")
    return checkpoint, folder, load_recipe(str(folder.recipe))


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; delete it or give another folder")


def _sequences_to_check(folder: RunFolder, recipe: Recipe) -> tuple[Sequence, ...]:
    store = SequenceStore(folder.sample_data(), "data")
    sequences = (sequence for index in range(len(store)) for sequence in store.unit(index))
    return tuple(islice(sequences, SEQUENCES_CHECKED))


def _load(base: str, revision: str | None) -> Any:
    # In host memory, where a model that needed many GPUs may still fit in float32.
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, revision=revision, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval()


@torch.no_grad()
def hugging_face_logps(model: Any, sequences: tuple[Sequence, ...], *, adapters: bool = True) -> Tensor:
    """log pi(y|x) by Hugging Face's own forward and log_softmax in float32: [responses]."""
    sums = []
    for sequence in sequences:
        batch = micro_batch([sequence]).to(model.device)
        with nullcontext() if adapters else model.disable_adapter():
            logits_TV = model(input_ids=batch.token_ids_T[None], use_cache=False).logits[0].float()
        logps_NV = logits_TV.index_select(0, batch.predictors_N).log_softmax(dim=-1)
        token_logps_N = logps_NV.gather(1, batch.targets_N[:, None]).squeeze(1)
        sums.append(response_logps(token_logps_N, batch.response_of_N, len(batch.responses)).cpu())
    return torch.cat(sums)


def _write_model(model: Any, chat: ChatTokenizer, folder: Path) -> None:
    choose_accelerator()  # transformers imports DeepSpeed to save
    model.generation_config = _ending_turns(model.generation_config, chat)
    model.config.use_cache = True
    model.save_pretrained(folder)
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
