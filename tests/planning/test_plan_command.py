"""`uft plan`: its table, its JSON, its exit codes."""

import json
import os
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from uft_ds.cli import app
from uft_ds.errors import EXIT_CHECK_FAILED, EXIT_DONE

ALTERNATIVE = {
    "type": "object",
    "required": [
        "changes", "deepspeed", "fits", "problems", "lacking", "gpu_bytes", "gpu_spare_bytes", "host_bytes",
        "bound_seconds",
    ],
    "additionalProperties": False,
    "properties": {
        "changes": {"type": "array", "items": {"type": "string"}},
        "deepspeed": {"type": "string"},
        "fits": {"type": "boolean"},
        "problems": {"type": "array", "items": {"type": "string"}},
        "lacking": {"type": "array", "items": {"type": "string"}},
        "gpu_bytes": {"type": "integer"},
        "gpu_spare_bytes": {"type": "integer"},
        "host_bytes": {"type": "integer"},
        "bound_seconds": {"type": "number"},
    },
}  # fmt: skip


def numbers(*names: str, **others: Any) -> dict[str, Any]:
    """An object of exactly these keys, which are numbers but for `others`."""
    properties = {name: {"type": ["number", "null"]} for name in names} | others
    return {
        "type": "object", "required": list(properties), "additionalProperties": False, "properties": properties,
    }  # fmt: skip


MODE = numbers(
    traffic=numbers("gathered_bytes", "reduced_bytes", "nvlink_bytes", "network_bytes", "pcie_bytes"),
    flops=numbers("policy", "reference", "recomputation", "attention", "head", "adapters", "reward_shift", "total"),
    time=numbers(
        "compute_seconds", "hbm_seconds", "nvlink_seconds", "network_seconds", "pcie_seconds", "bound_seconds",
        overlaps={"type": "boolean"}, bounded_by={"type": "string"},
    ),
)  # fmt: skip
SCHEMA = numbers(
    recipe={"type": "string"},
    fits={"type": "boolean"},
    problems={"type": "array"},
    lacking={"type": "array"},
    parameters=numbers("base", "lora", "layers"),
    cluster=numbers(
        "nodes", "gpus_per_node", "gpu_memory_bytes", "host_memory_bytes", "flops_per_second", "hbm_bytes_per_second",
        "nvlink_bytes_per_second", "pcie_bytes_per_second", "network_bytes_per_second", gpu={"type": "string"},
    ),
    deepspeed={"type": "string"},
    best_deepspeed={"type": ["string", "null"]},
    best_changes={"type": ["array", "null"], "items": {"type": "string"}},
    gpu_memory=numbers(
        "weights_shard_bytes", "secondary_shard_bytes", "gathered_bytes", "adapters_bytes", "gradients_bytes",
        "gradient_bucket_bytes", "optimizer_bytes", "saved_activations_bytes", "layer_bytes", "streams_bytes",
        "head_tile_bytes", "reserve_bytes", "total_bytes", "spare_bytes",
    ),
    host_memory=numbers(
        "processes_bytes", "weights_bytes", "page_locking_bytes", "optimizer_bytes", "activations_bytes",
        "checkpoint_bytes", "total_bytes", "spare_bytes",
    ),
    disk=numbers(
        "base_bytes", "checkpoint_bytes", "checkpoints_bytes", "merged_model_bytes", "reference_cache_bytes",
    ),
    step=numbers(
        "responses", "tokens", "micro_steps", "tokens_per_micro_batch", "mfu_flops", mode={"type": "string"},
        by_mode={"type": "object", "additionalProperties": MODE, "minProperties": 1},
    ),
    deepspeed_files={"type": "array", "items": ALTERNATIVE, "minItems": 4},
    remedies={"type": "array", "items": ALTERNATIVE},
    combination={"anyOf": [{"type": "null"}, ALTERNATIVE]},
    assumptions={"type": "array", "items": {"type": "string"}, "minItems": 4},
)  # fmt: skip
"""The keys that programs may rely on: one that is added belongs here, one that is taken away breaks them."""


@pytest.mark.parametrize(
    ("arguments", "lacking"),
    [
        (["uft_qwen32b"], []),
        (["uft_qwen32b", "--gpus", "1", "--gpu-memory", "24"], ["a GPU lacks"]),
        (["uft_qwen32b", "--host-memory", "8"], ["a node's host memory lacks"]),
        (["sft_mistral7b"], []),
    ],
    ids=["fits", "GPU", "host", "7B"],
)
def test_json_has_its_keys_and_the_exit_code_says_whether_it_fits(arguments: list[str], lacking: list[str]) -> None:
    """Nothing but JSON on stdout, of exactly the keys in the schema."""
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    found = json.loads(result.stdout)
    jsonschema.validate(found, SCHEMA)
    assert [text.rsplit(" ", 2)[0] for text in found["lacking"]] == lacking
    assert found["problems"] == []
    assert result.exit_code == (EXIT_CHECK_FAILED if lacking else EXIT_DONE)
    assert (found["gpu_memory"]["spare_bytes"] >= 0) is ("a GPU lacks" not in lacking)
    for one in (found, *found["deepspeed_files"], *found["remedies"]):
        assert one["fits"] is (one["problems"] == one["lacking"] == [])


def test_the_table_says_what_fits_and_what_to_take() -> None:
    """In a process of its own, as a user starts it, with the options of a cluster."""
    options = ["--nodes", "4", "--gpus", "8", "--gpu-memory", "80", "--host-memory", "1000", "--gpu", "h100"]
    links = ["--network-gbits", "400", "--pcie-gbytes", "55"]
    command = [sys.executable, "-m", "uft_ds", "plan", "uft_qwen32b", *options, *links]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=wide)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "32,763,876,352 parameters in 64 layers" in done.stdout
    for words in (
        "base weights, this rank's shard",
        "network, into a node, GB",
        "Fits: ",
        "zero3_offload",
        "seconds at least, at 2048 tokens a response",
        "for responses of this length a lower bound",
        "Assumed: ",
    ):
        assert words in done.stdout


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    """The lack in GB, the remedies with their effects, and changes that fit together."""
    result = CliRunner().invoke(app, ["plan", "uft_qwen32b", "--gpus", "1", "--gpu-memory", "24"])
    assert result.exit_code == EXIT_CHECK_FAILED
    assert "Does not fit: a GPU lacks" in result.stdout
    for words in ("what to change", "train.tokens_per_micro_batch=8192", "together", "No file of ds_configs/ fits"):
        assert words in result.stdout
