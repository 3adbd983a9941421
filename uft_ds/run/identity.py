"""A run's identity (content hashes, compared on resume) and its environment (versions, needed to reproduce it)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uft_ds.checkpoint.owner import Owner
from uft_ds.data.sources import PreparedData
from uft_ds.data.store.tokenized import read_key_parts
from uft_ds.host.callbacks import OnProgress
from uft_ds.recipe.file import leaves_of
from uft_ds.recipe.settings import Settings
from uft_ds.run.reward_stream import reward_identity
from uft_ds.streams.identity import adapter_identity, base_identity
from uft_ds.streams.load import attention_implementation, check_base

_PACKAGES = (
    "uft-ds", "torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "numpy", "flash-attn",
    "bitsandbytes",
)  # fmt: skip


MAY_CHANGE = (
    "name", "output", "launch.*", "tracking*", "deepspeed", "data.workers", "*.cache_dir", "train.checkpoint_every",
    "train.keep_checkpoints", "train.keep_best", "train.evaluate_every", "train.samples", "train.sample_tokens",
    "train.max_skipped_steps", "evaluate.*",
    "generator.url", "generator.served_model", "generator.key_env", "generator.max_dropped", "generator.max_kl",
    "generator.tokens_at_once",
    "generator.concurrency", "generator.timeout_seconds", "generator.patience_minutes", "*.score_by.workers",
    *(f"*.score_by.judge.{key}" for key in ("url", "key_env", "requests_per_minute", "concurrency")),
    *(f"*.score_by.judge.{key}" for key in ("timeout_seconds", "tries", "max_cost", "price*")),
    "train.tokens_per_micro_batch", "model.gradient_checkpointing", "model.activation_offload", "model.logits_mib",
)  # fmt: skip
"""Keys (patterns) that may change on resume: they decide how a run is computed, not what. Losses agree to rounding."""


def run_identity(settings: Settings, data: PreparedData, on_progress: OnProgress) -> dict[str, Any]:
    """Content hashes of base weights, adapters, and each source's rows, rules, tokenizer and template."""
    base, adapter, start = settings.model.base, settings.reference.adapter, settings.start_adapter
    revision = settings.model.revision
    content = base_identity(
        base, revision, partial(on_progress, f"hashing {base}"), quantization=settings.model.quantization
    )
    return {
        "base": content,
        "adapter": adapter_identity(Path(adapter)) if adapter else None,
        # Only where there is one: runs of versions without it have no such key, and their owners' hashes stay.
        **({"start": adapter_identity(Path(start), "start.adapter")} if start else {}),
        **reward_identity(settings),
        "data": {
            f"{part}.{number}": {key: parts[key] for key in ("content", "rules", "tokenizer", "chat_template")}
            for part, sources in (("sources", data.train), ("held_out", data.held_out))
            for number, source in enumerate(sources)
            for parts in [read_key_parts(settings.data.cache_dir, source.key)]
        },
    }


def may_change(key: str) -> bool:
    """Whether a run stays the same run if this key of its recipe changes: see `MAY_CHANGE`."""
    return _is_one_of(key, MAY_CHANGE)


_PLACES = (
    "model.base",
    "model.revision",
    "model.chat_template",
    "reference.adapter",
    "start.adapter",
    "data.*.path",
    "generator.run",
)
"""Keys (patterns) that say where an input lies; its content is in the identity."""


def owner(settings: Settings, identity: dict[str, Any]) -> Owner:
    """Whose the checkpoints of a run are. identity: as returned by `run_identity`."""
    leaves = leaves_of(settings.stored)
    kept = {key: leaves[key] for key in sorted(leaves) if not (may_change(key) or _is_one_of(key, _PLACES))}
    recipe, content = (json.dumps(part, sort_keys=True) for part in (kept, identity))
    return Owner(hashlib.sha256(recipe.encode()).hexdigest(), hashlib.sha256(content.encode()).hexdigest())


def _is_one_of(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def environment(settings: Settings) -> dict[str, object]:
    """Date, command, versions, attention, git revision and the identities of initial adapters, for reproducing the run.

    Raises:
        UserError: the base's config cannot be read.
    """
    adapter, start, model = settings.reference.adapter, settings.start_adapter, settings.model
    config = check_base(model.base, model.revision)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        # What `model.attention: auto` is here: it depends on the GPU and on flash-attn.
        "attention": attention_implementation(model.attention, getattr(torch, model.dtype), config),
        "git_revision": git_revision(),
        "reference_adapter": adapter_identity(Path(adapter)) if adapter else None,
        "start_adapter": adapter_identity(Path(start), "start.adapter") if start else None,
        **{f"{name}_adapter": identity for name, identity in reward_identity(settings).items()},
    }


def git_revision() -> str | None:
    """The commit of this checkout, marked where files differ from it; None where uft_ds is installed as a package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed as a package: a repository further up is not ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
