"""The files of ds_configs/: taken by DeepSpeed's own config class, filled by our engine and by other programs."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from pydantic import ValidationError
from transformers import TrainingArguments
from transformers.integrations import deepspeed as hugging_face

from uft_ds.engine.deepspeed_file import Aio, CommsLogger, FlopsProfiler, deepspeed_config, read_deepspeed_file
from uft_ds.engine.zero_section import check_ranks
from uft_ds.errors import UserError

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
RANKS = 16


def taken(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> DeepSpeedConfig:
    """What DeepSpeed makes of it on 16 ranks."""
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_world_size", lambda: RANKS)
    return DeepSpeedConfig(copy.deepcopy(config))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for child in value.values():
            yield from leaves(child)
    else:
        yield value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepspeed_takes_what_our_engine_makes_of_it(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of the file arrives, accumulation is 1 and clipping, dtypes and the batch are the recipe's."""
    file = read_deepspeed_file(name)
    config = taken(deepspeed_config(file, dtype=dtype, max_grad_norm=0.5), monkeypatch)
    arrived = config.zero_config.model_dump(by_alias=True)
    for key, value in file["zero_optimization"].items():
        found = arrived[key]
        assert (found | value if isinstance(value, dict) else value) == found, key
    assert (config.gradient_accumulation_steps, config.gradient_clipping) == (1, 0.5)
    assert config.train_batch_size == RANKS
    assert config.bfloat16_config.enabled == (dtype == torch.bfloat16)
    assert config.grad_accum_dtype == "fp32"


@pytest.mark.parametrize("name", NAMES)
def test_hugging_faces_programs_can_use_it(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its Trainer's arguments replace every "auto", and DeepSpeed takes the result."""
    arguments = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    filled = hugging_face.HfTrainerDeepSpeedConfig(str(FOLDER / f"{name}.json"))
    try:
        filled.trainer_config_process(arguments)
        filled.trainer_config_finalize(arguments, model=SimpleNamespace(), num_training_steps=10)
    finally:
        hugging_face.unset_hf_deepspeed_config()
    assert "auto" not in set(leaves(filled.config))
    config = taken(filled.config, monkeypatch)
    assert config.train_batch_size == 2 * 3 * RANKS
    assert config.bfloat16_config.enabled


@pytest.mark.parametrize("name", NAMES)
def test_a_typo_would_be_found(name: str, tmp_path: Path) -> None:
    """Any key of any section with a letter too many is refused by DeepSpeed's class, and by us with the right name."""
    original = json.loads((FOLDER / f"{name}.json").read_text())
    for key in original["zero_optimization"]:
        config = copy.deepcopy(original)
        section = config["zero_optimization"]
        section[f"{key}x"] = section.pop(key) if key != "stage" else section[key]
        with pytest.raises(ValidationError, match=f"{key}x"):
            DeepSpeedConfig({**config, "train_batch_size": 1} | dict.fromkeys(config.keys() - {"zero_optimization"}, 1))
        path = tmp_path / "file.json"
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=re.escape(f"zero_optimization.{key}x")) as refused:
            read_deepspeed_file(str(path))
        assert f"did you mean '{key}'?" in str(refused.value)
    for key in original:
        path.write_text(json.dumps({f"{key}x": value for key, value in original.items()}))
        with pytest.raises(UserError, match="did you mean"):
            read_deepspeed_file(str(path))


def test_each_file_is_explained() -> None:
    """A row of ds_configs/README.md for every file and no other."""
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert sorted(rows) == NAMES


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"stage": 3, "zero_quantized_weights": True}, "the trained model would not be the saved one; leave it out"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients: it rounds gradients"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "rounds only float16 weights"),
        ({"stage": 2, "compute_grad_norm": False}, "compute_grad_norm: the norm is recorded, and clipped by"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow: it updates some weights later than others"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            "offload_optimizer.super_offload: it steps by an optimiser of DeepSpeed's own",
        ),
        ({"stage": 3, "mics_shard_size": 8}, "DeepSpeed has removed MiCS; zero_hpz_partition_size keeps"),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size: only stage 3 gathers weights"),
        ({"stage": 1}, "file.json: zero_optimization.stage: 1 found, expected 2 or 3: with bfloat16"),
        ({"stage": 0}, "file.json: zero_optimization.stage: 0 found, expected 2 or 3"),
        ({"stage": True}, "zero_optimization.stage: "),
        ({"overlap_comm": True}, "file.json: zero_optimization.stage: None found, expected 2 or 3"),
        (
            {"stage": 3, "zero_hpz_partition_size": 8, "offload_param": {"device": "nvme", "nvme_path": "/x"}},
            "offload_param.device: 'nvme' found",
        ),
    ],
)
def test_what_would_go_wrong_is_refused_by_key(tmp_path: Path, section: dict[str, Any], expected: str) -> None:
    """Before anything is launched, with the reason."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    with pytest.raises(UserError, match="zero_optimization") as refused:
        read_deepspeed_file(str(path))
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("ranks", "per_node", "expected"),
    [
        (16, 8, None),
        (16, None, None),
        (8, 8, "the second copy only takes memory"),
        (4, 4, "8 found, expected a divisor of the 4 ranks"),
        (12, 6, "8 found, expected a divisor of the 12 ranks"),
        (16, 4, "8 found, but a node has 4 ranks"),
    ],
)
def test_a_node_must_hold_whole_copies(ranks: int, per_node: int | None, expected: str | None) -> None:
    """A group divides the ranks and lies inside a node; one group alone is taken, with a warning."""
    zero = read_deepspeed_file("zero3_node")["zero_optimization"]
    options: dict[str, Any] = {"ranks": ranks, "ranks_per_node": per_node}
    if expected is None:
        assert check_ranks(zero, "zero3_node", **options) == []
    elif expected.startswith("8 found"):
        with pytest.raises(UserError, match=r"zero3_node: zero_optimization\.zero_hpz") as refused:
            check_ranks(zero, "zero3_node", **options)
        assert expected in str(refused.value)
    else:
        (warning,) = check_ranks(zero, "zero3_node", **options)
        assert expected in warning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "key 'stage' is given twice"),
        ('{"aio": {}, "aio": {}, "zero_optimization": {"stage": 3}}', "key 'aio' is given twice"),
        (
            '{"zero_optimization": {"stage": 3}, "steps_per_print": "x"}',
            "steps_per_print: 'x' found, expected a number",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "steps_per_print": true}',
            "steps_per_print: True found, expected a number",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "wall_clock_breakdown": 1}',
            "wall_clock_breakdown: 1 found, expected true",
        ),
        ('{"zero_optimization": {"stage": 3}, "flops_profiler": []}', "flops_profiler: [] found, expected an object"),
        (
            '{"zero_optimization": {"stage": 3}, "aio": {"block_size": "1M"}}',
            "aio.block_size: '1M' found, expected a valid integer",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "aio": {"queue_dept": 8}}',
            "aio: unknown key 'queue_dept'; did you mean 'queue_depth'?",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "comms_logger": {"prof_ops": "all"}}',
            "comms_logger.prof_ops: 'all' found, expected a valid list",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "flops_profiler": {"enabled": true}}',
            "flops_profiler.enabled: true found, expected false",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "flops_profiler": {"profile_step": "5"}}',
            "flops_profiler.profile_step: '5' found, expected a valid integer",
        ),
        ("[" * 10_000, "not a readable JSON file"),
    ],
)
def test_what_would_be_taken_wrongly_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The last of two keys, or a value that ends the ranks after the launch."""
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_deepspeed_file(str(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody may ever write to it."""
    path = tmp_path / "ds.json"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        read_deepspeed_file(str(path))


def test_sections_have_the_keys_and_defaults_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that a newer DeepSpeed adds or renames is seen here, not by a user."""
    theirs = taken(deepspeed_config(read_deepspeed_file("zero3"), dtype=torch.float32, max_grad_norm=1), monkeypatch)
    profiler = {key: vars(theirs.flops_profiler_config)[key] for key in FlopsProfiler.model_fields}
    assert FlopsProfiler().model_dump() == profiler
    assert Aio().model_dump() == get_aio_config({"aio": {}})
    assert CommsLogger().model_dump() == CommsLoggerConfig().model_dump()
