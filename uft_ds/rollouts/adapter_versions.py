"""The policy's adapter as folders for a server, a new one for each version, checked before the server may see it.

    FOLDER/NNNNNN-DIGEST8/{adapter_config.json, adapter_model.safetensors}

A server takes almost anything for an adapter: with layers missing, with tensors of another shape or rank than the
config says, with NaN, it loads the folder and answers by something else than the policy. So this is checked here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uft_ds.checkpoint.tensor_file import check_same, save_tensors
from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.files import sync
from uft_ds.rollouts.answers import PolicyVersion
from uft_ds.streams.adapter_files import CONFIG, WEIGHTS
from uft_ds.streams.lora_config import LORA_TENSOR, is_plain_lora

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank accepts."""
_KEPT = 2
_VERSION = re.compile(r"\d{6,}-[0-9a-f]{8}")
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_HEAD_OR_EMBEDDING = re.compile(r"(^|\.)(lm_head|embed_\w+|word_embeddings|wte|embed_out)$")
_NOT_SERVED = {
    "use_dora": "DoRA",
    "lora_bias": "an adapter with biases",
    "modules_to_save": "layers that are trained whole",
    "target_parameters": "adapters of the fused weights of experts",
    "trainable_token_indices": "trained embeddings of single tokens",
    "layer_replication": "repeated layers",
    "rank_pattern": "another rank for some layers: the server would scale them by the rank of all others",
    "alpha_pattern": "another alpha for some layers: the server would scale them by the alpha of all others",
    "alora_invocation_tokens": "an adapter that begins at certain tokens",
}
"""Fields of PEFT's config, and what a value in them asks for."""


@dataclass(frozen=True)
class Adapters:
    """Where a run writes its adapters for a server, and what each is called.

    folder: absolute, on a disk that the server sees under the same path.
    config: adapter_config.json. run: the run's name; servers shared by several runs tell their adapters apart by it.
    """

    folder: Path
    config: bytes
    run: str

    def named(self, suffix: str) -> str:
        """A name for the server: letters, digits and `._-` alone."""
        return f"uft-{re.sub(r'[^A-Za-z0-9._-]', '-', self.run)}-{suffix}"


def check_servable(config: bytes, *, max_rank: int | None = None) -> None:
    """Refuse, before anything is launched, an adapter that no server takes, or that it would take for another one.

    Args:
        config: adapter_config.json. max_rank: the server's --max-lora-rank, where it is known.
    Raises:
        UserError: names the recipe's key.
    """
    fields = _fields(config)
    for key, meaning in _NOT_SERVED.items():
        if fields.get(key):
            raise UserError(f"lora: {key} is {fields[key]!r}: {meaning}; a server cannot answer by such an adapter")
    if fields.get("bias", "none") != "none":
        raise UserError(f"lora: bias is {fields['bias']!r}, expected 'none': a server has no place for biases")
    targets = fields["target_modules"]
    for target in [targets] if isinstance(targets, str) else targets:
        if _HEAD_OR_EMBEDDING.search(target):
            raise UserError(
                f"lora.targets: {target!r}: servers leave out an adapter on the head or the embedding in some of their "
                "log-probs; name linear layers of the decoder"
            )
    most = max(MAX_RANKS) if max_rank is None else max_rank
    if fields["r"] > most:
        whose = "any server takes" if max_rank is None else "this server was started for (--max-lora-rank)"
        raise UserError(f"lora.rank: {fields['r']} given, at most {most} is what {whose}")


def version_name(version: PolicyVersion, config: bytes) -> str:
    """`NNNNNN-DIGEST8`: the step, and a hash of tensors and config.

    The config belongs to it: the same tensors with another alpha are another policy, and servers keep what they have
    computed for a name and a path.
    """
    digest = hashlib.sha256(version.digest.encode() + b"\0" + config).hexdigest()[:8]
    return f"{version.step:06d}-{digest}"


def write_version(adapters: Adapters, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> Path:
    """Write and check the folder of a version.

    Raises:
        CheckFailed: what lies on the disk, or what was given, is not a whole and finite adapter of this config.
        UserError: it cannot be written.
    """
    path = adapters.folder / version_name(version, adapters.config)
    write_adapter(path, adapters.config, tensors)
    return path


def write_adapter(path: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Write one adapter: under another name, synced, read back and checked, then renamed.

    Raises: as `write_version`.
    """
    check_whole(config, tensors)
    # Of their own storage: tensors that were gathered may be views of one buffer, which safetensors does not write.
    contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if _holds(path, config, contiguous):
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_tensors(temporary / WEIGHTS, contiguous, {"format": "pt"})
        (temporary / CONFIG).write_bytes(config)
        for name in (WEIGHTS, CONFIG):
            sync(temporary / name)
        sync(temporary)
        check_version(temporary, config, contiguous)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{path.parent}: the adapter for the server cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _holds(path: Path, config: bytes, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an earlier start of the run has left this very adapter. A server may have loaded it from there."""
    try:
        check_version(path, config, tensors)
    except CheckFailed:
        return False
    return True


def check_version(folder: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a folder that does not hold exactly this adapter.

    Raises:
        CheckFailed: names the file and the tensor.
    """
    try:
        stored = (folder / CONFIG).read_bytes()
        check_same(folder / WEIGHTS, tensors)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckFailed(f"{folder}: the adapter cannot be read back ({error})") from None
    if stored != config:
        raise CheckFailed(f"{folder / CONFIG}: it is not what was written")
    for name, tensor in tensors.items():
        if read[name].dtype != tensor.dtype:
            raise CheckFailed(f"{folder / WEIGHTS}: {name} is {read[name].dtype}, {tensor.dtype} was written")
    check_whole(stored, read)


def check_whole(config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not the whole adapter of this config.

    Each adapted layer has A of [rank, in] and B of [out, rank] with the config's rank, in one dtype, and all values are
    finite. Each target of the config has a layer, and each layer is a target.

    Raises:
        CheckFailed: names the tensor.
    """
    fields = _fields(config)
    rank, alpha = fields["r"], fields.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise CheckFailed(f"adapter: lora_alpha is {alpha!r}, expected a number above 0")
    if not tensors:
        raise CheckFailed("adapter: it has no tensors")
    sides: dict[str, set[str]] = {}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None or not is_plain_lora(name, tensor.shape, rank):
            raise CheckFailed(
                f"adapter: {name} of shape {list(tensor.shape)}: expected lora_A of [{rank}, in] or lora_B of [out, "
                f"{rank}], by the rank {rank} of the config"
            )
        if tensor.numel() == 0:
            raise CheckFailed(f"adapter: {name} is empty: it was not gathered from all ranks")
        if not torch.isfinite(tensor).all():
            raise CheckFailed(f"adapter: {name} holds NaN or infinity: the training has diverged, or a gather failed")
        sides.setdefault(match["module"], set()).add(match["side"])
    if len(dtypes) > 1:
        raise CheckFailed(f"adapter: its tensors are of several types: {', '.join(sorted(map(str, dtypes)))}")
    for module, found in sides.items():
        if len(found) < 2:
            raise CheckFailed(f"adapter: {module} has lora_{found.pop()} alone, expected lora_A and lora_B")
    _check_targets(fields["target_modules"], sides)


def _check_targets(targets: Any, modules: Collection[str]) -> None:
    if isinstance(targets, str):  # a regular expression, or a word of PEFT's for many layers
        return
    for target in targets:
        if not any(_is_of(module, target) for module in modules):
            raise CheckFailed(f"adapter: no tensor of a layer {target!r}, which the config names")
    for module in modules:
        if not any(_is_of(module, target) for target in targets):
            raise CheckFailed(f"adapter: {module} is no target of the config, so a server may leave it out")


def _is_of(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def delete_old(folder: Path, current: Path) -> None:
    """Delete all versions but the current one and the one that was written before it, and what was left unfinished.

    A server that still has an older name for a moment may read its folder, so one more is kept.

    Raises:
        OSError: one cannot be deleted.
    """
    others = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name) and path.name != current.name]
    others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    unfinished = [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]
    for path in (*others[_KEPT - 1 :], *unfinished):
        shutil.rmtree(path)


def rank_of(config: bytes) -> int:
    """The rank of all layers of a config that `check_servable` accepts."""
    return int(_fields(config)["r"])


def scale_of(config: bytes) -> float:
    """What the product of B and A is multiplied by."""
    fields = _fields(config)
    rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank


def _fields(config: bytes) -> dict[str, Any]:
    """The config that `adapter_config_of` has made: fields that are not as PEFT writes them are a fault of ours."""
    fields: dict[str, Any] = json.loads(config)
    assert fields["peft_type"] == "LORA"
    assert fields["r"] >= 1
    return fields
