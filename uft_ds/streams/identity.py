"""Identity of a reference by content: hashes of the weights, config and adapter that its log-probs depend on.

Paths are no part of it, so a copied or moved model has the same identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.hub import no_network_hint
from uft_ds.host.remembered_hashes import remembered_sha256
from uft_ds.streams.adapter_files import adapter_file
from uft_ds.streams.adapters import lora_form

OnFile = Callable[[int, int], None]
"""Called with the number of files hashed so far and the number of all files."""

_NOT_NUMBERS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of a config.json that change no log-prob. The dtype of the computation is set by the recipe, not here."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_THREADS = 8


def base_identity(
    base: str,
    revision: str | None,
    on_file: OnFile = lambda done, total: None,
    *,
    quantization: str | None = None,
) -> dict[str, Any]:
    """SHA-256 of every weight file and of the relevant keys of config.json, and how the weights are rounded.

    65 GB take about a minute. Hashes are cached by a file's path, inode, size and times.

    Args:
        quantization: the recipe's `model.quantization`; the identity of a base without it has no such key.
    Raises:
        UserError: the folder holds no weights, or a file cannot be read.
    """
    folder = local_folder(base, revision)
    config: dict[str, Any] = json.loads(
        (folder / "config.json").read_text(encoding="utf-8")
    )  # `check_base` has read it
    return {
        "weights": sorted(_hash_files(weight_files(folder), on_file)),
        "config": _digest({key: value for key, value in config.items() if key not in _NOT_NUMBERS}),
        **({} if quantization is None else {"quantization": quantization}),
    }


def adapter_identity(folder: Path, recipe_key: str = "reference.adapter") -> str:
    """SHA-256 of an adapter's tensors and of the config fields that its output depends on, such as alpha.

    Args:
        recipe_key: what messages call the adapter.
    """
    return _digest([sha256(adapter_file(folder)), lora_form(folder, recipe_key)])


def reference_identity(content: dict[str, Any], *, dtype: str, attention: str, adapter_dtype: str | None) -> str:
    """One name, 64 hex digits, for everything that a reference's log-probs depend on except the tokens.

    Args:
        content: the result of `base_identity`, with the adapter's identity under `adapter`.
        attention: the implementation in use; implementations round differently.
    """
    return _digest({**content, "dtype": dtype, "attention": attention, "adapter_dtype": adapter_dtype, "version": 1})


def local_folder(base: str, revision: str | None) -> Path:
    """The folder of a base model's files. A hub model is downloaded into the hub's cache first.

    Raises:
        UserError: the files cannot be downloaded.
    """
    if Path(base).exists():
        return Path(base)
    from huggingface_hub import snapshot_download

    # Not *.safetensors: some models contain a second copy of all weights in another layout.
    patterns = ["config.json", "generation_config.json", "model.safetensors*", "model-*.safetensors"]
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(base, revision=revision, allow_patterns=["pytorch_model*.bin*"]))
    except Exception as error:  # noqa: BLE001 - the hub's client raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.base: the files of {base!r} cannot be downloaded from the hub ({reason}){no_network_hint()}"
        ) from None
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load: a single one, or those that an index names.

    Raises:
        UserError: there are none, the index cannot be read, or it names a file that is not in the folder.
    """
    found = index_file(folder)
    if found.name in _WEIGHTS:
        return [found]
    try:
        shards = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or not all(isinstance(shard, str) and shard for shard in shards):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"model.base: {found}: expected an index of weight files with a weight_map") from None
    for shard in sorted(shards):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise UserError(f"model.base: {found}: names {shard!r}, expected only files in the model's own folder")
        if not (folder / shard).is_file():
            raise UserError(
                f"model.base: {folder / shard}: cannot be read: {found.name} names it, but it does not exist; fetch or "
                "copy it again"
            )
    return [folder / shard for shard in sorted(shards)]


def index_file(folder: Path) -> Path:
    """The single weight file, or the index of several: the one that transformers would choose.

    Raises:
        UserError: neither exists.
    """
    for name in _WEIGHTS:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return path
    raise UserError(f"model.base: {folder} holds no weights; expected {' or '.join(_WEIGHTS)}, or their index")


def _hash_files(paths: Iterable[Path], on_file: OnFile) -> list[str]:
    paths = [path.resolve() for path in paths]  # the hub's cache links to its blobs
    digests: list[str] = []
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for digest in pool.map(remembered_sha256, paths):
                digests.append(digest)
                on_file(len(digests), len(paths))
    except OSError as error:
        raise UserError(f"model.base: {error.filename}: cannot be read ({error.strerror})") from None
    return digests


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
