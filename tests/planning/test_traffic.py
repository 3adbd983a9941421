"""What a plan sends: gathers and reductions over each link, by the sharding."""

from dataclasses import asdict

import pytest
from plans import cluster, outcome


def test_lockstep_and_a_cached_reference_gather_what_sft_gathers() -> None:
    """To the byte; two forwards gather the layers three times instead of twice."""
    by_mode, sft = outcome().by_mode, outcome("objective.loss=nll").by_mode["cached"]
    assert by_mode["lockstep"].traffic == by_mode["cached"].traffic == sft.traffic
    ratio = by_mode["separate"].traffic.gathered_bytes / sft.traffic.gathered_bytes
    assert 1.4 < ratio < 1.5
    saved = by_mode["lockstep"].flops.total - by_mode["cached"].flops.total
    assert saved > by_mode["lockstep"].flops.reference > 0


def share_entering_a_node(nodes: int, gpus: int) -> float:
    """Of what an all-gather returns, when every rank hands on to the next one what it has just been given."""
    ranks = nodes * gpus
    in_hand = list(range(ranks))  # whose shard each rank sends next
    has = [{rank} for rank in range(ranks)]
    entered = 0
    while any(len(shards) < ranks for shards in has):
        in_hand = [in_hand[rank - 1] for rank in range(ranks)]
        for rank, shard in enumerate(in_hand):
            has[rank].add(shard)
            entered += rank // gpus == 1 and (rank - 1) // gpus != 1
    return entered / ranks


def test_links_of_flat_sharding_and_of_sharding_inside_a_node() -> None:
    """Flat, every node takes in what a ring of all ranks brings; inside a node only adapters cross."""
    four = cluster(nodes=4)
    flat = outcome("train.examples_per_step=256", on=four).by_mode["lockstep"].traffic
    # Inside a node, 7 of 8 GPUs are others.
    expected = share_entering_a_node(4, 8) * (flat.gathered_bytes + flat.reduced_bytes)
    assert flat.network_bytes == pytest.approx(expected, rel=1e-6)
    assert flat.nvlink_bytes == pytest.approx(7 / 8 * (flat.gathered_bytes + flat.reduced_bytes), rel=1e-6)
    near = outcome("train.examples_per_step=256", on=four, zero={"zero_hpz_partition_size": 8})
    moved, lora = near.by_mode["lockstep"].traffic, 134_217_728
    # The adapters, once a step in float32, and their gradients, in float32 too, each micro-step.
    assert moved.network_bytes == pytest.approx(31 / 32 * lora * (4 + 4), rel=1e-3)
    assert moved.gathered_bytes == flat.gathered_bytes
    assert near.gpu.secondary_shard_bytes == pytest.approx(2 * 32_763_876_352 / 8, rel=1e-3)
    odd = outcome(on=cluster(nodes=3, gpus=4), zero={"zero_hpz_partition_size": 8})
    assert not odd.fits
    assert "does not divide a node's 4 GPUs: copy the file with zero_hpz_partition_size 4" in odd.problems[0]


def test_one_gpu_sends_nothing_and_offloading_costs_pcie() -> None:
    """Nothing to gather on a single rank; with weights on the host, they come over PCIe for each pass."""
    alone = outcome(on=cluster(gpus=1)).by_mode["lockstep"].traffic
    assert asdict(alone) == dict.fromkeys(asdict(alone), 0)
    offloaded = outcome("deepspeed=zero3_offload", on=cluster(gpus=1))
    moved = offloaded.by_mode["lockstep"].traffic
    micro_steps = offloaded.setting.workload.micro_steps(1)
    assert moved.pcie_bytes > micro_steps * 1.9 * 2 * 32_763_876_352
    assert offloaded.gpu.weights_shard_bytes == offloaded.gpu.optimizer_bytes == 0
    host = offloaded.host
    assert host.weights_bytes > 2 * 32_763_876_352
    assert 0 < host.page_locking_bytes < host.weights_bytes


def test_a_copy_of_the_base_is_counted_where_it_lies() -> None:
    """As the reference of a base that is trained: in host memory under ZeRO-3, fetched once a micro-step over PCIe;
    whole on each GPU under ZeRO-2. With the cache there is none."""
    cached, live, whole = (
        outcome("lora=null", f"reference.cache={cache}", f"deepspeed={file}")
        for cache, file in (("true", "zero3"), ("false", "zero3"), ("false", "zero2"))
    )
    size, ranks = 2 * 32_763_876_352, 8
    assert list(live.by_mode) == ["separate", "cached"]
    assert size <= live.host.reference_bytes < 1.001 * size
    assert cached.host.reference_bytes == whole.host.reference_bytes == 0
    assert live.gpu.weights_shard_bytes == cached.gpu.weights_shard_bytes == 0
    assert whole.gpu.weights_shard_bytes == size
    forwarded, spared = (live.by_mode[mode].traffic for mode in ("separate", "cached"))
    micro_steps = live.setting.workload.micro_steps(ranks)
    more = forwarded.gathered_bytes - spared.gathered_bytes
    assert more == pytest.approx(micro_steps * size, rel=0.001)
    assert forwarded.pcie_bytes == pytest.approx(more / ranks, rel=1e-6)
    assert spared.pcie_bytes == 0
    on_one = outcome("lora=null", "reference.cache=false", on=cluster(gpus=1))
    assert on_one.by_mode["separate"].traffic.pcie_bytes == on_one.setting.workload.micro_steps(1) * size


def test_fewer_tokens_at_once_hold_less_and_send_more() -> None:
    """Half the tokens of a micro-batch: twice the micro-steps and their traffic."""
    whole, half = outcome(), outcome("train.tokens_per_micro_batch=8192")
    assert half.gpu.saved_activations_bytes == pytest.approx(whole.gpu.saved_activations_bytes / 2, rel=0.01)
    assert (whole.setting.workload.micro_steps(8), half.setting.workload.micro_steps(8)) == (1, 2)
    gathered = [o.by_mode["lockstep"].traffic.gathered_bytes for o in (whole, half)]
    assert gathered[1] == 2 * gathered[0]
