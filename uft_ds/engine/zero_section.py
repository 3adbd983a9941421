"""Checks of the `zero_optimization` section of a DeepSpeed file: refused settings, and the ranks that it can run on."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uft_ds.engine.accelerator import choose_accelerator
from uft_ds.errors import UserError

NODE_KEY = "zero_hpz_partition_size"
"""Number of ranks that share one whole copy of the base, such as the GPUs of a node: hpZ of ZeRO++ (2306.10209)."""

UNUSABLE = {
    "zero_quantized_weights": (
        "it rounds weights to 8 bits for every gather, the adapters' too: the trained model would not be the saved one"
    ),
    "zero_quantized_gradients": "it rounds gradients, which are exact here",
    "zero_quantized_nontrainable_weights": (
        "DeepSpeed rounds only float16 weights, and only those frozen before the adapters are added: it would do "
        "nothing here"
    ),
    "zenflow": "it updates some weights later than others: another training, in which resumes are not exact",
    "mics_shard_size": f"DeepSpeed has removed MiCS; {NODE_KEY} keeps a copy of the base in every node",
    "mics_hierarchical_params_gather": f"DeepSpeed has removed MiCS; {NODE_KEY} keeps a copy of the base in every node",
}
"""Keys that must not be set, each with the reason."""


def check_zero_section(zero: Any, path: Path) -> None:
    """Refuse settings that DeepSpeed does not accept, that change numbers, or that break checkpoints.

    Args:
        zero: the section as it was read from the file.
        path: the file's, for the message.
    Raises:
        UserError: names the file and the key.
    """
    where = f"deepspeed: {path}: zero_optimization"
    if not isinstance(zero, dict):
        raise UserError(f"{where}: found {zero!r}, expected an object with stage 2 or 3")
    stage = zero.get("stage")
    if type(stage) is int and stage == 1:
        raise UserError(
            f"{where}.stage: 1 found, expected 2 or 3: with bfloat16 DeepSpeed trains stage 1 by another optimiser, in "
            "which neither exact gradients nor resumes are tested; stage 2 shards the gradients as well"
        )
    if type(stage) is not int or stage not in (2, 3):
        raise UserError(f"{where}.stage: {stage!r} found, expected 2 or 3")
    for key, why in UNUSABLE.items():
        if zero.get(key):
            raise UserError(f"{where}.{key}: {why}; leave it out")
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{where}.compute_grad_norm: the norm is recorded, and clipped by; leave it out")
    offloaded = zero.get("offload_optimizer")
    if isinstance(offloaded, dict) and offloaded.get("super_offload"):
        raise UserError(
            f"{where}.offload_optimizer.super_offload: it steps by an optimiser of DeepSpeed's own, which is not the "
            "one that is trained and resumed with here; leave it out"
        )
    if isinstance(offloaded, dict) and offloaded.get("device") == "nvme":
        raise UserError(
            f"{where}.offload_optimizer.device: 'nvme' found, expected 'cpu': checkpoints read the optimiser's state "
            "in memory, and a LoRA's is small"
        )
    try:
        parsed = parsed_zero_section(zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        near = difflib.get_close_matches(key, _names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != key else ""
        raise UserError(f"{where}.{key}: {first['msg']}{hint}") from None
    in_nodes = parsed.zero_hpz_partition_size > 1
    if in_nodes and stage != 3:
        raise UserError(f"{where}.{NODE_KEY}: only stage 3 gathers weights, found stage {stage}; leave it out")
    if in_nodes and parsed.offload_param is not None and parsed.offload_param.device == "nvme":
        raise UserError(f"{where}.offload_param.device: 'nvme' found, expected 'cpu' or 'none' with {NODE_KEY}")


def parsed_zero_section(zero: Mapping[str, Any]) -> Any:
    """A section as DeepSpeed parses it: with its defaults, its older key names, and "auto" treated as an absent key.

    Args:
        zero: a section that `check_zero_section` has accepted.
    """
    choose_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils import logger

    # DeepSpeed warns of older key names on stdout, where a command may print JSON. The engine parses the section again
    # and repeats the warning.
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return DeepSpeedZeroConfig(**zero)
    finally:
        logger.setLevel(before)


def _names() -> list[str]:
    """The keys as a file spells them: `stage3_prefetch_bucket_size`, not the name of DeepSpeed's field."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]


def check_ranks(zero: Mapping[str, Any], file: str, *, ranks: int, ranks_per_node: int | None) -> list[str]:
    """Refuse numbers of ranks that the section cannot run on.

    Args:
        zero: a section that `check_zero_section` has accepted.
        file: the file's name or path, for the message.
        ranks_per_node: None if the launcher does not tell it.
    Returns:
        warnings that the user should read before the run.
    Raises:
        UserError: names the file and the key.
    """
    where = f"deepspeed: {file}: zero_optimization"
    warnings = []
    group = int(parsed_zero_section(zero).zero_hpz_partition_size)
    if group > 1:
        if ranks % group:
            raise UserError(
                f"{where}.{NODE_KEY}: {group} found, expected a divisor of the {ranks} ranks, such as the number of "
                "GPUs of a node; copy the file, change the number, and give the copy's path (on one node: use zero3)"
            )
        if ranks_per_node is not None and ranks_per_node % group:
            raise UserError(
                f"{where}.{NODE_KEY}: {group} found, but a node has {ranks_per_node} ranks: gathers would cross nodes; "
                f"copy the file, set {ranks_per_node}, and give the copy's path"
            )
        if ranks == group:
            warnings.append(
                f"{where}.{NODE_KEY}: all {ranks} ranks share one copy of the base, which is sharded over them "
                "already: the second copy only takes memory; zero3 does the same without it"
            )
    return warnings
