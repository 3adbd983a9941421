"""Invariant 6 on real ranks: lockstep, separate forwards and a cached reference give one process's numbers, however
the weights are sharded, offloaded, tied, checkpointed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import REAL_PARTITIONING, UNEVEN, accumulate, assert_same_step, engine_of, single_process
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from toy import UFT, forwarded, saved_adapter, toy_model, toy_step

from uft_ds.data.micro_batch import micro_batch
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.recompute import Recompute


def variant_step(folder: Path, file: str, model: dict[str, Any]) -> Any:
    engine = engine_of(folder, file=file, **model)
    sequences = toy_step().sequences
    batches = [micro_batch([sequences[i] for i in members]) for members in UNEVEN[engine.world_size][engine.rank]]
    grads, total = accumulate(engine, batches, UFT)
    return grads, total, engine.step(1e-3).grad_norm, []


@pytest.mark.parametrize(
    ("architecture", "tied", "file", "ranks", "model"),
    [
        pytest.param("llama", True, "zero3_offload", 2, {"gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param(
            "qwen3",
            False,
            "zero3_cpu",
            2,
            {"gradient_checkpointing": True, "activation_offload": True},
            marks=pytest.mark.long,
        ),
        ("mistral", False, "zero2", 2, {"gradient_checkpointing": True}),
        pytest.param("llama", False, "zero3_cpu", 2, {"gradient_checkpointing": "selective"}, marks=pytest.mark.long),
        pytest.param("qwen2", True, "zero3_cpu", 2, {"reference_mode": "separate"}, marks=pytest.mark.long),
        pytest.param("qwen2", False, "zero3_offload", 1, {}, marks=pytest.mark.long),
        pytest.param(
            "llama",
            True,
            "zero3_cpu",
            2,
            {"trains_all": True, "gradient_checkpointing": "selective"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_any_sharding_gives_the_same_step(
    tmp_path: Path, architecture: Any, tied: bool, file: str, ranks: int, model: dict[str, Any]
) -> None:
    """Gradients, their norm and the loss equal one process's without DeepSpeed, two separate forwards, to 1e-5."""
    folder = build_tiny_model(tmp_path, architecture, tied=tied)
    trains_all = model.get("trains_all", False)
    definition = single_process(folder, "mse", reference_mode="separate", trains_all=trains_all)
    for result in run_on_ranks(variant_step, ranks, folder, file, model):
        assert_same_step(result, definition)


def partitioned_step(folder: Path, mode: Recompute) -> dict[str, torch.Tensor]:
    """Of a base that is loaded shard by shard, as runs do it: DeepSpeed then has its own linear layer."""
    file = read_deepspeed_file("zero3_cpu")
    file["zero_optimization"] |= REAL_PARTITIONING
    config = deepspeed_config(file, dtype=torch.float32, max_grad_norm=1e6, own_linear=mode != "selective")
    with partitioned_loading(config):
        model = toy_model(folder, gradient_checkpointing=mode)
    assert (torch.nn.functional.linear is torch._C._nn.linear) == (mode == "selective")
    engine = Engine(model, config, layer_class=decoder_layer_class(model.policy.get_base_model()), weight_decay=0.0)
    sequences = toy_step().sequences
    batches = [micro_batch([sequences[i] for i in members]) for members in UNEVEN[engine.world_size][engine.rank]]
    return accumulate(engine, batches, UFT)[0]


def test_selective_recomputing_counts_biases_once(tmp_path: Path) -> None:
    """Qwen2's biases, which DeepSpeed's linear layer adds in place to a result that is kept, and not zero here."""
    folder = build_tiny_model(tmp_path, "qwen2")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    biases = [name for name in tensors if name.endswith("_proj.bias")]
    assert biases
    for name in biases:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, {"format": "pt"})
    expected, found = (run_on_ranks(partitioned_step, 2, folder, mode)[0] for mode in (True, "selective"))
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def weights_around_a_step(folder: Path) -> Any:
    """The frozen reference adapter before and after a step that moves the policy's."""
    from deepspeed import zero

    engine = engine_of(folder / "base", reference_adapter=folder / "adapter", b_std=0.0)
    sequences = toy_step().sequences
    batch = micro_batch(sequences[engine.rank :: engine.world_size])
    logps = forwarded(engine, batch)
    logps_R, reference_R = logps["policy"].detach(), logps["reference"]
    states = []
    for _ in range(2):
        named = {name: p for name, p in engine.module.named_parameters() if "lora_B" in name}
        engine._engine.empty_partition_cache()
        with zero.GatheredParameters(list(named.values())):
            states.append({name: p.detach().clone() for name, p in named.items()})
        grads, _ = accumulate(engine, [batch], UFT)
        engine.step(1e-2)
    return float((logps_R - reference_R).abs().max()), set(grads), states


def test_a_reference_adapter_is_sharded_and_stays(tmp_path: Path) -> None:
    """Log-ratios exactly 0 at the start on two ZeRO-3 ranks; a step moves every policy adapter and no reference one."""
    build_tiny_model(tmp_path / "base")
    saved_adapter(tmp_path / "base", tmp_path / "adapter")
    for ratio, trained, (before, after) in run_on_ranks(weights_around_a_step, 2, tmp_path):
        assert ratio == 0.0
        assert trained
        assert all(".default." in name for name in trained)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == (".reference." in name), name
        assert all(tensor.any() for tensor in before.values())
