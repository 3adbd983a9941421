"""Writing checkpoints: the adapter in PEFT's format, and where the run stood.

Only trainable parameters are gathered and written; the frozen base never is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from uft_ds.checkpoint.manifest import MANIFEST, manifest_problem, write_manifest
from uft_ds.errors import CheckFailed, UserError
from uft_ds.files import sync, write_atomically
from uft_ds.training.engine import Engine
from uft_ds.training.reference_cache import ReferenceCache
from uft_ds.training.run_folder import RunFolder


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: all that a step depends on besides the weights.

    reward_shift: what the reward shift goes on with: its running mean, or the last step's value.
    """

    step: int
    skipped_steps: int
    reward_shift: float = 0.0


def save_checkpoint(
    engine: Engine,
    policy: PeftModel,
    folder: RunFolder,
    state: TrainerState,
    reference: ReferenceCache,
    *,
    keep: int,
) -> None:
    """Write `checkpoints/step-N` whole or not at all, and keep the newest `keep`. Every rank must call it.

    Raises:
        CheckFailed: what was read back is not what a trained adapter looks like.
    """
    with engine.gathered_trainable() as named:
        if engine.rank == 0:
            prefix = "policy."
            tensors = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
            adapter = get_peft_model_state_dict(policy, state_dict=tensors)
            adapter = {name: tensor.cpu().contiguous() for name, tensor in adapter.items()}
    if engine.rank == 0:
        target = folder.checkpoints / f"step-{state.step:06d}"
        temporary = folder.checkpoints / f".step-{state.step:06d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "adapter").mkdir(parents=True)
        save_file(adapter, temporary / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_adapter_config(policy, temporary / "adapter")
        write_atomically(temporary / "trainer.json", json.dumps(asdict(state), indent=2) + "\n")
        reference.save(temporary)
        _check_adapter(
            temporary / "adapter" / "adapter_model.safetensors", adapter, trained=state.step > state.skipped_steps
        )
        write_manifest(temporary)
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _point_latest(folder, target)
        _prune(folder, keep)
    torch.distributed.barrier()


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run, or `run` itself where it is a checkpoint; its files are as they were written.

    Raises:
        UserError: none, or a broken one; names the file.
    """
    run = run.resolve()  # `latest` is a link
    candidates = [run] if (run / MANIFEST).exists() else sorted((run / "checkpoints").glob("step-*"), reverse=True)
    if not candidates:
        raise UserError(f"{run}: holds no checkpoint; expected a run's folder or one of its checkpoints/step-N")
    problem = manifest_problem(candidates[0])
    if problem is not None:
        others = f"; older ones: {', '.join(c.name for c in candidates[1:])}" if candidates[1:] else ""
        raise UserError(f"checkpoint {candidates[0].name} is damaged: {problem}{others}")
    return candidates[0]


def _write_adapter_config(policy: PeftModel, folder: Path) -> None:
    config: Any = policy.peft_config["default"]
    inference_mode = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference_mode


def _check_adapter(path: Path, written: dict[str, torch.Tensor], *, trained: bool) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(written):
            raise CheckFailed(f"{path}: {len(list(file.keys()))} tensors read back, {len(written)} written")
        any_b = False
        for name, tensor in written.items():
            read = file.get_tensor(name)
            if read.numel() == 0 or not torch.equal(read, tensor) or not torch.isfinite(read).all():
                raise CheckFailed(f"{path}: {name} is empty, not finite, or not what was written")
            any_b = any_b or ("lora_B" in name and bool(read.any()))
    if trained and not any_b:
        raise CheckFailed(f"{path}: every lora_B is zero after training: these adapters were never updated")


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _point_latest(folder: RunFolder, target: Path) -> None:
    link = folder.path / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target.relative_to(folder.path))
    link.replace(folder.latest)


def _prune(folder: RunFolder, keep: int) -> None:
    for old in sorted(folder.checkpoints.glob("step-*"), reverse=True)[keep:]:
        (old / MANIFEST).unlink(missing_ok=True)  # invalid first, then gone
        shutil.rmtree(old)
