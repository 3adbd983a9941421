"""zero3_node (hpZ): a copy of the base in every group of ranks changes who is asked for weights, and no number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import REAL_PARTITIONING, UNEVEN, accumulate, assert_same_step, resumed_run, saved_run, single_process
from ranks import run_on_ranks
from runs import adapter, losses, numbers, recipe_in, uft
from tiny import build_tiny_model
from toy import UFT, forwarded, toy_model, toy_step

from uft_ds.data.micro_batch import micro_batch
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading
from uft_ds.streams.load import decoder_layer_class

RANKS, GROUP = 4, 2


def node_file(folder: Path, name: str = "zero3_node") -> str:
    """The shipped file with groups of 2, and buckets small enough that a tiny model is gathered again and again."""
    config = read_deepspeed_file(name)
    config["zero_optimization"] |= REAL_PARTITIONING | {"zero_hpz_partition_size": GROUP}
    path = folder / "node.json"
    path.write_text(json.dumps(config))
    return str(path)


def loaded_engine(folder: Path, file: str, **model: Any) -> Engine:
    """As a run builds it: each rank reads its shard alone."""
    config = deepspeed_config(read_deepspeed_file(file), dtype=torch.float32, max_grad_norm=1e6)
    with partitioned_loading(config):
        uft_model = toy_model(folder, **model)
    layer = decoder_layer_class(uft_model.policy.get_base_model())
    return Engine(uft_model, config, layer_class=layer, weight_decay=0.0)


def steps(folder: Path, file: str, model: dict[str, Any]) -> Any:
    """A step, (ranks, elements) of each gather of the next forwards and backwards, and what lies on this rank."""
    import deepspeed.comm.comm as comm

    engine = loaded_engine(folder, file, **model)
    sequences = toy_step().sequences
    batches = [micro_batch([sequences[i] for i in members]) for members in UNEVEN[RANKS][engine.rank]]
    grads, total = accumulate(engine, batches, UFT)
    norm = engine.step(1e-3).grad_norm
    sizes: list[tuple[int, int]] = []
    backend: Any = comm.cdb
    gather = backend.all_gather_into_tensor

    def counted(output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> Any:
        sizes.append((output_tensor.numel() // input_tensor.numel(), output_tensor.numel()))
        return gather(output_tensor=output_tensor, input_tensor=input_tensor, **options)

    backend.all_gather_into_tensor = counted
    for number, batch in enumerate(batches):
        engine.backward(forwarded(engine, batch)["policy"].sum(), is_last=number == len(batches) - 1)
    backend.all_gather_into_tensor = gather
    frozen: list[Any] = [p for p in engine.module.parameters() if not p.requires_grad]
    trainable: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
    held = [sum(p.ds_tensor.numel() for p in frozen), sum(p.ds_secondary_tensor.numel() for p in frozen)]
    return (grads, total, norm, []), sizes, held, *(sum(p.ds_numel for p in group) for group in (frozen, trainable))


@pytest.mark.parametrize(
    ("architecture", "tied", "model"),
    [
        pytest.param("qwen2", False, {}, marks=pytest.mark.long),
        ("llama", True, {"gradient_checkpointing": True}),
    ],
)
def test_a_copy_in_every_group_gives_the_same_step(
    tmp_path: Path, architecture: Any, tied: bool, model: dict[str, Any]
) -> None:
    """Gradients, norm and loss equal one process's to 1e-5; the base is gathered inside the group of 2 alone, of which
    each rank holds a half; over all 4 ranks the adapters alone are gathered, once after a step."""
    folder = build_tiny_model(tmp_path, architecture, tied=tied)
    definition = single_process(folder, "mse")
    for result, sizes, (primary, secondary), frozen, trained in run_on_ranks(
        steps, RANKS, folder, node_file(tmp_path), model
    ):
        assert_same_step(result, definition)
        assert primary == pytest.approx(frozen / RANKS, rel=0.01)
        assert secondary == pytest.approx(frozen / GROUP, rel=0.01)
        inside = sum(numel for ranks, numel in sizes if ranks == GROUP)
        across = sum(numel for ranks, numel in sizes if ranks == RANKS)
        assert inside + across == sum(numel for _, numel in sizes)
        assert inside > 2 * frozen
        assert across == trained


@pytest.mark.long
def test_a_run_trains_and_goes_on(tmp_path: Path) -> None:
    """`uft train` on 4 ranks has the losses of zero3_cpu, and repeats its second half from a checkpoint bit for bit."""
    base = build_tiny_model(tmp_path / "base")
    changes = {"train__steps": 4, "launch": {"ranks": RANKS}}
    plain, copies = (recipe_in(tmp_path / name, base, **changes) for name in ("plain", "copies"))
    run = tmp_path / "copies" / "run"
    trained = uft("train", str(plain)), uft("train", str(copies), f"deepspeed={node_file(tmp_path)}")
    for result in trained:
        assert result.returncode == 0, result.stdout + result.stderr
        assert "every log-ratio is 0.0 nats" in result.stdout
    assert losses(run) == pytest.approx(losses(tmp_path / "plain" / "run"), rel=1e-5)
    expected, weights = numbers(run), adapter(run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    for name in ("DONE", "latest", "status.json"):
        (run / name).unlink()
    resumed = uft("train", str(copies), "--resume", f"deepspeed={node_file(tmp_path)}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert numbers(run) == expected
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapter(run).items())


@pytest.mark.long
def test_a_fresh_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What is restored is what is forwarded: the copies inside the groups are not those of the weights before."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    file = node_file(tmp_path)
    expected = run_on_ranks(saved_run, RANKS, base, tmp_path, file, {})
    for (after, found), (straight, trained) in zip(
        run_on_ranks(resumed_run, RANKS, base, tmp_path, file, {}), expected, strict=True
    ):
        assert after == straight
        assert all(torch.equal(found[name], trained[name]) for name in trained)
