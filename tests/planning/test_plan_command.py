"""`uft plan`: its table, its JSON, its exit codes."""

import json
from typing import Any

import jsonschema
import pytest
from runs import uft
from typer.testing import CliRunner

from uft_ds.cli import app
from uft_ds.commands import shared
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
    parameters=numbers("base", "active", "lora", "layers"),
    cluster=numbers(
        "nodes", "gpus_per_node", "gpu_memory_bytes", "host_memory_bytes", "flops_per_second", "hbm_bytes_per_second",
        "nvlink_bytes_per_second", "pcie_bytes_per_second", "network_bytes_per_second", gpu={"type": "string"},
        assumed={"type": ["string", "null"]},
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
        "processes_bytes", "weights_bytes", "reference_bytes", "page_locking_bytes", "optimizer_bytes",
        "activations_bytes", "checkpoint_bytes", "total_bytes", "spare_bytes",
    ),
    disk=numbers(
        "base_bytes", "checkpoint_bytes", "checkpoints_bytes", "merged_model_bytes", "reference_cache_bytes",
    ),
    step=numbers(
        "responses", "tokens", "micro_steps", "tokens_per_micro_batch", "mfu_flops", mode={"type": "string"},
        by_mode={"type": "object", "additionalProperties": MODE, "minProperties": 1},
    ),
    run=numbers(
        "responses", "tokens", "steps", "epochs", "bound_seconds", "forecast_seconds", "mfu",
        counted_from={"enum": ["recipe", "token cache", None]}, mfu_from={"enum": ["assumed", "measured", "option"]},
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
        pytest.param(["uft_qwen32b", "--host-memory", "8"], ["a node's host memory lacks"], marks=pytest.mark.long),
        pytest.param(["sft_mistral7b"], [], marks=pytest.mark.long),
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
    """In a process of its own, with the options of a cluster."""
    options = ["--nodes", "4", "--gpus", "8", "--gpu-memory", "80", "--host-memory", "1000", "--gpu", "h100"]
    links = ["--network-gbits", "400", "--pcie-gbytes", "55"]
    done = uft("plan", "uft_qwen32b", *options, *links)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "32,763,876,352 parameters in 64 layers" in done.stdout
    text = " ".join(done.stdout.split())  # lines break anywhere
    for words in (
        "uft_qwen32b on 4 x 8 H100 80 GB, 80.0 GB each; deepspeed=zero3",
        "base weights, shard of a rank",
        "network, into a node, GB",
        "Fits: ",
        "zero3_offload",
        "40,000 responses of 2,048 tokens (data.max_length, the most there can be), at most 625 steps, 1 epoch.",
        "at an MFU of 0.30, which is assumed (--mfu)",
        "for responses of this length a lower bound",
        "Assumed: ",
    ):
        assert words in text


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    """The lack in GB, the remedies with their effects, and changes that fit together."""
    result = CliRunner().invoke(app, ["plan", "uft_qwen32b", "--gpus", "1", "--gpu-memory", "24"])
    assert result.exit_code == EXIT_CHECK_FAILED
    assert "Does not fit: a GPU lacks" in result.stdout
    for words in ("what to change", "train.tokens_per_micro_batch=8192", "Take deepspeed=zero3_offload train.tokens"):
        assert words in result.stdout


@pytest.mark.parametrize("columns", [80, 110, 120])
def test_a_plan_gives_one_answer_at_every_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral-7B on one GPU of 24 GB: the headline, the first of the list and the JSON name the same change; one GPU
    has no traffic, so no row of a table is zeros; and no line is wrapped within a table."""
    monkeypatch.setattr(shared.console, "width", columns)
    options = ["plan", "uft_mistral7b", "--gpus", "1", "--gpu", "h100", "--gpu-memory", "24"]
    lines = CliRunner().invoke(app, options).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    told = " ".join(lines[: lines.index("")])
    first = lines[next(i for i, line in enumerate(lines) if line.startswith("what to change")) + 1]
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    change = "train.tokens_per_micro_batch=8192"
    assert f"Take {change}, the cheapest change that fits" in told
    assert first.split()[0] == change
    assert found["best_changes"] == found["remedies"][0]["changes"] == [change]
    assert not [line for line in lines if line.split()[-3:] == ["0.0"] * 3 or "0.00" in line.split()]
    assert not [line for line in lines if "network" in line or "gathered" in line]
    assert [len(line.split()) for line in lines if line.startswith("base weights")] == [9]  # both halves on one line


def test_the_hardware_that_is_assumed_is_in_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --gpu and --gpus, on a machine without a GPU; nothing is assumed where both are given."""
    monkeypatch.setattr("uft_ds.planning.hardware.found_here", tuple)
    first = CliRunner().invoke(app, ["plan", "uft_mistral7b"]).stdout.splitlines()[0]
    assert "8 H100 80 GB" in first
    assert "(assumed: no GPU here; --gpu and --gpus say others)" in first
    first = CliRunner().invoke(app, ["plan", "uft_mistral7b", "--gpus", "2", "--gpu", "rtx4090"]).stdout.splitlines()[0]
    assert "2 RTX 4090, 24.0 GB each; deepspeed" in first
