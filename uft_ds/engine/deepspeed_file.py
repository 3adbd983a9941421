"""DeepSpeed files: read by name or path, checked key by key, and completed with the values that the recipe decides."""

from __future__ import annotations

import difflib
import json
from collections.abc import Set
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uft_ds.engine.zero_section import check_zero_section
from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text
from uft_ds.recipe.settings import Settings

OWNED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
}
"""Keys that the recipe decides. A DeepSpeed file may omit them or set them to "auto"."""

FREE_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "aio",
}
"""Keys that a DeepSpeed file may set; they are passed on unchanged."""


class _Section(BaseModel):
    """A section in which DeepSpeed ignores a misspelt key, and meets a wrong type when the ranks already run."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Aio(_Section):
    """Asynchronous reads and writes of offloaded weights on NVMe."""

    block_size: int = Field(1 << 20, ge=4096)
    queue_depth: int = Field(8, ge=1)
    intra_op_parallelism: int = Field(1, ge=1)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CommsLogger(_Section):
    """A log of collectives."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(_Section):
    """A table of operations by module."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


_SECTIONS: dict[str, type[_Section]] = {"aio": Aio, "comms_logger": CommsLogger, "flops_profiler": FlopsProfiler}


def read_deepspeed_file(name_or_path: str) -> dict[str, Any]:
    """Read a file of ds_configs/ by its name, or a DeepSpeed JSON file by its path.

    DeepSpeed ignores misspelt keys at the top level and in most sections, so the keys are checked here.

    Raises:
        UserError: the file does not exist or is not JSON, or it sets a key twice, an unknown one, or one that the
            recipe decides.
    """
    path = _deepspeed_path(name_or_path)
    try:
        config = json.loads(read_regular_text(path), object_pairs_hook=_without_doubled_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed: {path}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path}: expected a JSON object, found {type(config).__name__}")
    for key, value in config.items():
        if key in OWNED_KEYS and not _leaves_it_to_the_recipe(value):
            raise UserError(f'deepspeed: {path}: {key}: the recipe decides it; leave it out or give "auto"')
        if key not in OWNED_KEYS | FREE_KEYS:
            raise UserError(f"deepspeed: {path}: {_unknown(key, FREE_KEYS, OWNED_KEYS)}")
        if key in _SECTIONS:
            _check_section(key, value, path)
            if key == "flops_profiler" and value.get("enabled"):
                raise UserError(
                    f"deepspeed: {path}: flops_profiler.enabled: true found, expected false: it counts a quarter of "
                    "the operations, because it does not see the linear layers of this package; `uft plan` counts "
                    "them, and the metric mfu is measured by that count"
                )
        elif (expected := _expected_of(key, value)) is not None:
            raise UserError(f"deepspeed: {path}: {key}: {value!r} found, expected {expected}")
    check_zero_section(config.get("zero_optimization"), path)
    return dict(config)


def with_deepspeed_file(settings: Settings) -> Settings:
    """Settings with the content of the DeepSpeed file.

    Raises:
        UserError: the file cannot be read, or DeepSpeed or the recipe does not allow its content.
    """
    deepspeed = settings.deepspeed
    if deepspeed.config is not None:
        return settings
    return replace(settings, deepspeed=replace(deepspeed, config=read_deepspeed_file(deepspeed.name)))


def _expected_of(key: str, value: Any) -> str | None:
    """What a free key's value should be; None if it is that. DeepSpeed reads them when the ranks already run."""
    if key in OWNED_KEYS or key == "zero_optimization":
        return None
    if key == "steps_per_print":
        is_number = value is None or (type(value) in (int, float) and value >= 1)
        return None if is_number else "a number of at least 1, or null"
    return None if isinstance(value, bool) else "true or false"


def _unknown(key: str, known: Set[str], meant: Set[str] = frozenset()) -> str:
    """The message for an unknown key: the nearest of the `known` and the `meant` keys, or all known ones."""
    near = difflib.get_close_matches(key, known | meant, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown key {key!r}; {hint}"


def _check_section(key: str, value: Any, path: Path) -> None:
    """Refuse an unknown key or a value of another type, before the ranks run.

    Raises:
        UserError: names the file and the key.
    """
    try:
        _SECTIONS[key].model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join((key, *map(str, first["loc"])))
        if first["type"] == "extra_forbidden":
            known = set(_SECTIONS[key].model_fields)
            raise UserError(f"deepspeed: {path}: {key}: {_unknown(str(first['loc'][-1]), known)}") from None
        expected = "an object" if not first["loc"] else first["msg"].removeprefix("Input should be ")
        raise UserError(f"deepspeed: {path}: {place}: {first['input']!r} found, expected {expected}") from None


def _without_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python's reader takes the last of two equal keys without a word.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found


def _leaves_it_to_the_recipe(value: Any) -> bool:
    """Whether a value is `"auto"`, or a section of only such values: Hugging Face's files say `{"enabled": "auto"}`."""
    if isinstance(value, dict):
        return all(map(_leaves_it_to_the_recipe, value.values()))
    return bool(value == "auto")


def deepspeed_files() -> dict[str, Path]:
    """The paths of the files of ds_configs/, by name."""
    # An installed package holds the folder; in a source checkout it lies beside the package.
    packaged = Path(str(resources.files("uft_ds"))) / "ds_configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "ds_configs"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def _deepspeed_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".json"):
        return Path(name_or_path).expanduser()
    files = deepspeed_files()
    if name_or_path not in files:
        names = ", ".join(files)
        raise UserError(f"deepspeed: no file named {name_or_path!r} in ds_configs; there are: {names}; or give a path")
    return files[name_or_path]


def deepspeed_config(
    file: dict[str, Any], *, dtype: torch.dtype, max_grad_norm: float, own_linear: bool = True
) -> dict[str, Any]:
    """A complete DeepSpeed config: the file's values, and the values that the recipe decides.

    Args:
        own_linear: whether DeepSpeed may put its own function in the place of torch's linear layer (ZeRO-3). It keeps a
            gathered weight from being saved for the backward; where layers are recomputed, nothing of them is saved.
    """
    kept = {key: value for key, value in file.items() if key not in OWNED_KEYS}
    if not own_linear and "zero_optimization" in kept:
        kept["zero_optimization"] = kept["zero_optimization"] | {"memory_efficient_linear": False}
    return {
        **kept,
        # A forward takes one packed row. The number of rows varies by step, so `Engine.backward` sets the accumulation
        # boundary itself, and DeepSpeed must not divide by a fixed number of micro-steps.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # By default DeepSpeed reduces the gradients of float32 adapters on a bfloat16 base in bfloat16, which changes
        # them by 0.2% (docs/findings.md).
        "communication_data_type": "fp32",
        # torch's AdamW is kept even if the optimiser is offloaded: its state is small with LoRA, and DeepSpeed's own
        # CPU optimiser would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": file.get("steps_per_print", 2**31),  # by default never: the run prints its own lines
    }
