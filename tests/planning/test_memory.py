"""What a plan needs of GPUs and hosts: what it adds up to, how it scales, and cases that are known."""

from dataclasses import asdict

import pytest
from plans import cluster, outcome, plan, planner

from uft_ds.planning import parts


def test_a_32b_model_in_nf4_fits_one_gpu_of_48_gb() -> None:
    """Policy and reference: 31e9 weights of 0.516 bytes and 1.6e9 of 2 are 19.1 GB; in 16 bits they are 65.5."""
    of_nf4 = plan(name="uft_qwen32b_nf4", gpus=1, gpu="l40s", gpu_memory=None)
    assert of_nf4.outcome.fits
    assert of_nf4.outcome.gpu_spare_bytes > 5e9
    assert of_nf4.outcome.gpu.weights_shard_bytes == pytest.approx(19.2e9, rel=0.01)
    plain = plan("model.quantization=null", name="uft_qwen32b_nf4", gpus=1, gpu="l40s", gpu_memory=None)
    assert not plain.outcome.fits
    assert plain.outcome.gpu.weights_shard_bytes == pytest.approx(65.5e9, rel=0.01)


def test_a_base_in_nf4_must_fit_as_it_is_loaded() -> None:
    """In shards of 16 bits under ZeRO-3: 65.5 GB on one GPU of 48, 32.8 on each of two. Its codes, 16 GB, are whole on
    every rank's host until the engine shards them."""
    nf4 = {"name": "uft_qwen32b_nf4", "gpu": "l40s", "gpu_memory": None}
    one = plan("deepspeed=zero3", gpus=1, **nf4)
    assert one.outcome.gpu_spare_bytes > 0, "a step would fit"
    assert not one.outcome.fits
    (problem,) = one.outcome.problems
    assert problem.startswith("model.quantization: nf4: while the base is loaded, a GPU holds its shard in bfloat16")
    assert "deepspeed=zero2" in problem
    assert plan("deepspeed=zero3", gpus=2, **nf4).outcome.fits
    assert plan("deepspeed=zero3_offload", gpus=1, **nf4).outcome.fits
    assert plan(gpus=8, host_memory=200, **nf4).outcome.fits
    (problem,) = plan(gpus=8, host_memory=150, **nf4).outcome.problems
    assert "each of a node's 8 ranks holds all codes in host memory" in problem


def test_host_memory_is_a_limit_too() -> None:
    """Weights that the GPUs do not hold must fit somewhere."""
    small = plan("deepspeed=zero3_offload", host_memory=64)
    assert small.outcome.gpu_spare_bytes > 0
    assert small.outcome.host_spare_bytes is not None
    assert small.outcome.host_spare_bytes < 0
    assert not small.outcome.fits
    assert any(remedy.outcome.fits for remedy in small.remedies)


def test_parts_add_up_to_the_whole() -> None:
    """Of a layer at work and the head only the larger counts; all other parts do."""
    gpu = outcome().gpu
    either = max(gpu.layer_bytes, gpu.streams_bytes + gpu.head_tile_bytes)
    others = sum(asdict(gpu).values()) - gpu.layer_bytes - gpu.streams_bytes - gpu.head_tile_bytes
    assert gpu.total_bytes == others + either


@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_shards_sum_to_the_whole(ranks: int) -> None:
    """All ranks' shards are the model and at most a number of padding a parameter and rank."""
    structure = planner().structure(outcome().setting.workload)
    item_bytes = structure.item_bytes("bfloat16")
    whole = parts.weights_bytes(structure, item_bytes, 1)
    shards = ranks * parts.weights_bytes(structure, item_bytes, ranks)
    assert whole == 2 * structure.num_base
    assert whole <= shards <= whole + 2 * ranks * len(structure.sizes)


def test_twice_the_ranks_hold_half() -> None:
    """Shards halve; what a micro-batch needs does not change."""
    eight, sixteen = outcome(), outcome(on=cluster(nodes=2))
    for part in ("weights_shard_bytes", "optimizer_bytes", "gradients_bytes", "adapters_bytes"):
        assert getattr(sixteen.gpu, part) == pytest.approx(getattr(eight.gpu, part) / 2, rel=1e-3)
    for part in ("saved_activations_bytes", "layer_bytes", "gathered_bytes", "head_tile_bytes"):
        assert getattr(sixteen.gpu, part) == getattr(eight.gpu, part)
