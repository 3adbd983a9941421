"""Plans: what they add up to, how they scale, and what they say of cases that are known."""

import io
import json
import tempfile
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from suites import long_but
from tiny import build_tiny_model, rope_of

from uft_ds.data.bins import fewest_micro_steps
from uft_ds.data.formats.table import FORMATS
from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.planning import parts
from uft_ds.planning.alternatives import larger_clusters
from uft_ds.planning.hardware import Cluster, Figures, Found, cluster_of
from uft_ds.planning.plan import Plan, make_plan
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.shapes import model_config, shipped_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.table import rendered
from uft_ds.planning.values import as_json
from uft_ds.planning.workload import WITHOUT_PAIRS, workload_of
from uft_ds.recipe.file import shipped_recipes
from uft_ds.recipe.settings import load_settings

MISTRAL = shipped_config("Mistral-7B-v0.1")


def cluster(nodes: int = 1, gpus: int = 8, **options: Any) -> Cluster:
    gpu = options.pop("gpu", "h100")
    figures = Figures(**({"gpu_memory": 80, "host_memory": 1000, "network_gbits": 400} | options))
    return cluster_of(nodes=nodes, gpus=gpus, gpu=gpu, figures=figures)


@lru_cache
def planner(base: str = "Qwen/Qwen2.5-32B") -> Planner:
    """Of one model; what plans share is computed once."""
    return Planner(model_config(base)[0])


def outcome(*overrides: str, on: Cluster | None = None, zero: dict[str, Any] | None = None) -> Outcome:
    """Of the 32B recipe. zero: changes to its DeepSpeed file."""
    settings = load_settings("uft_qwen32b", overrides)
    file = read_deepspeed_file(settings.deepspeed.name)
    file["zero_optimization"] |= zero or {}
    workload = workload_of(settings, shipped_config("Qwen2.5-32B"), tokens_per_response=None)
    return planner().plan(Setting(workload, settings.deepspeed.name, sharding_of(file), on or cluster()))


@lru_cache
def plan(*overrides: str, nodes: int = 1, gpus: int = 8, name: str = "uft_qwen32b", **options: Any) -> Plan:
    settings = load_settings(name, overrides)
    return make_plan(settings, cluster(nodes, gpus, **options), planner=planner(settings.model.base))


@lru_cache
def tiny_folder(architecture: Any = "qwen2") -> Path:
    return build_tiny_model(Path(tempfile.mkdtemp()), architecture)


def tiny(*overrides: str, gpus: int = 1, **options: Any) -> Plan:
    """A recipe of a model of some kilobytes, planned in a second."""
    given = ("model.attention=sdpa", "data.max_length=64", "train.tokens_per_micro_batch=256", "lora.rank=4")
    return plan(f"model.base={tiny_folder()}", *given, *overrides, gpus=gpus, name="uft_mistral7b", **options)


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


def test_the_32b_recipe_fits_eight_gpus_of_80_gb() -> None:
    """With the file that it has, and with room; LoRA runs of this model on 8 x 80 GB are published."""
    found = plan()
    assert found.outcome.fits
    assert found.best_file is not None
    assert found.best_file.outcome.setting.deepspeed == "zero3"
    assert 20e9 < found.outcome.gpu_spare_bytes < 60e9
    assert found.remedies == ()
    assert found.combination is None


def test_weights_whole_on_each_gpu_do_not_fit_there() -> None:
    """65.5 GB of weights and 16,384 tokens: `zero2` is refused the 80 GB, and adapters would change their type."""
    zero2 = next(file for file in plan().files if file.outcome.setting.deepspeed == "zero2")
    assert not zero2.outcome.fits
    assert zero2.outcome.gpu.weights_shard_bytes == 2 * 32_763_876_352
    assert zero2.changes == ("deepspeed=zero2", "lora.dtype=bfloat16")


def test_one_gpu_of_24_gb_needs_more_than_one_change() -> None:
    """No single change suffices; the combination that is named fits, and its plan is its own."""
    found = plan(gpus=1, gpu_memory=24)
    assert not found.outcome.fits
    assert found.best_file is None
    one_gpu = [remedy for remedy in found.remedies if remedy.outcome.setting.cluster.ranks == 1]
    assert one_gpu
    assert not any(remedy.outcome.fits for remedy in one_gpu)
    assert found.combination is not None
    assert found.combination.outcome.fits
    assert found.combination.outcome.setting.cluster == found.outcome.setting.cluster
    overrides = [change for change in found.combination.changes if not change.startswith("--")]
    again = plan(*overrides, gpus=found.combination.outcome.setting.cluster.gpus, gpu_memory=24)
    assert again.outcome.gpu == found.combination.outcome.gpu


def test_two_gpus_of_40_gb_are_told_to_offload() -> None:
    """The weights' shard alone is 33 GB: the host has to hold it, and that fits."""
    found = plan(gpus=2, gpu_memory=40)
    assert not found.outcome.fits
    assert found.best_file is not None
    assert found.best_file.outcome.setting.deepspeed == "zero3_offload"
    fitting = [remedy for remedy in found.remedies if remedy.outcome.fits]
    assert ("deepspeed=zero3_offload",) in [remedy.changes for remedy in fitting]


def test_every_remedy_is_a_plan_that_frees_memory() -> None:
    """Its changes, given to the command, give its figures; the first are no dearer than those after them."""
    found = plan(gpus=2, gpu_memory=40)
    for remedy in found.remedies:
        assert remedy.outcome.fits or remedy.outcome.gpu_spare_bytes > found.outcome.gpu_spare_bytes
        overrides = [change for change in remedy.changes if not change.startswith("--")]
        options = dict(change.removeprefix("--").split() for change in remedy.changes if change.startswith("--"))
        given = {"gpus": 2, **{name: int(value) for name, value in options.items()}}
        assert plan(*overrides, **given, gpu_memory=40).outcome.gpu == remedy.outcome.gpu
    fits = [remedy.outcome.fits for remedy in found.remedies]
    assert fits == sorted(fits, reverse=True), "what suffices comes first"
    for part in (True, False):
        ordered = [one.outcome for one in found.remedies if one.outcome.fits is part]
        for one, after in pairwise((each.setting.cluster.ranks, each.bound_seconds) for each in ordered):
            assert one[0] < after[0] or (one[0] == after[0] and one[1] <= 1.011 * after[1])
    assert "zero3_cpu" not in {remedy.outcome.setting.deepspeed for remedy in found.remedies}


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ((), {"gpus": 1, "gpu_memory": 24}),
        ((), {"gpus": 2, "gpu_memory": 40}),
        ((), {"gpus": 2, "gpu_memory": 40, "pcie_gbytes": 4}),
        (("deepspeed=zero3_offload",), {"gpus": 8, "host_memory": 64}),
        (("deepspeed=zero2",), {"gpus": 8}),
        ((), {"nodes": 4, "network_gbits": 50}),
        ((), {"gpus": 8}),
    ],
    ids=["one of 24 GB", "two of 40 GB", "slow PCIe", "host", "zero2", "slow network", "fits"],
)
def test_there_is_one_answer_and_nothing_that_is_shown_is_cheaper(
    overrides: tuple[str, ...], options: dict[str, Any]
) -> None:
    """What to take heads the list; of all that is planned and fits on the given GPUs, no step is shorter by over 1%,
    but those of files for whose sake a fitting recipe would have to be changed."""
    found = plan(*overrides, **options)
    answer = found.answer
    assert answer is not None
    assert answer.outcome.fits
    given = found.outcome.setting.cluster
    planned = [*found.files, *found.options]
    rivals = [one for one in planned if one.outcome.fits and one.outcome.setting.cluster == given]
    if found.outcome.fits:
        rivals = [one for one in rivals if "lora.dtype" not in " ".join(one.changes)]
    else:
        assert found.options[0] is answer
    assert answer.outcome.setting.cluster == given or not rivals
    for rival in rivals:
        assert answer.outcome.bound_seconds <= 1.011 * rival.outcome.bound_seconds
    values = as_json(found)
    assert values["best_changes"] == list(answer.changes)
    assert values["best_deepspeed"] == answer.outcome.setting.deepspeed


def test_several_cheap_changes_are_taken_before_a_dear_one() -> None:
    """Behind slow PCIe offloading fits alone, but takes 15 times as long as fewer tokens and logits at once."""
    found = plan(name="uft_mistral7b", gpus=1, gpu_memory=19.8, pcie_gbytes=2)
    single = next(one for one in found.remedies if one.outcome.fits)
    assert found.combination is not None
    assert found.answer is found.combination
    assert 10 * found.combination.outcome.bound_seconds < single.outcome.bound_seconds


def test_a_file_of_ones_own_is_kept_where_it_is_as_fast(tmp_path: Path) -> None:
    """A recipe that fits with its own DeepSpeed file is not told to take a shipped one."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps(read_deepspeed_file("zero3")))
    found = tiny(f"deepspeed={own}")
    assert found.answer is not None
    assert found.answer.changes == ()
    assert found.answer.outcome.setting.deepspeed == str(own)


def test_host_memory_is_a_limit_too() -> None:
    """Weights that the GPUs do not hold must fit somewhere."""
    small = plan("deepspeed=zero3_offload", host_memory=64)
    assert small.outcome.gpu_spare_bytes > 0
    assert small.outcome.host_spare_bytes is not None
    assert small.outcome.host_spare_bytes < 0
    assert not small.outcome.fits
    assert any(remedy.outcome.fits for remedy in small.remedies)


def test_a_short_host_is_told_to_keep_activations_on_the_gpu() -> None:
    """Where they were sent there and the GPU has room for them."""
    found = plan("model.activation_offload=true", host_memory=80)
    assert found.outcome.gpu_spare_bytes > 0
    assert not found.outcome.fits
    told = {remedy.changes: remedy.outcome.fits for remedy in found.remedies}
    assert told[("model.activation_offload=false",)]


def test_no_remedy_breaks_the_limit_that_was_kept() -> None:
    """A GPU that is short is not told to move to a host what does not go in there."""
    found = plan(gpus=2, gpu_memory=40, host_memory=20)
    assert not found.outcome.fits
    assert (found.outcome.host_spare_bytes or 0) > 0
    assert found.remedies
    for remedy in found.remedies:
        assert (remedy.outcome.host_spare_bytes or 0) >= 0
    assert ("deepspeed=zero3_offload",) not in [remedy.changes for remedy in found.remedies]


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


def test_lockstep_and_a_cached_reference_gather_what_sft_gathers() -> None:
    """To the byte; two forwards gather the layers three times instead of twice."""
    by_mode, sft = outcome().by_mode, outcome("objective.loss=nll").by_mode["cached"]
    assert by_mode["lockstep"].traffic == by_mode["cached"].traffic == sft.traffic
    ratio = by_mode["separate"].traffic.gathered_bytes / sft.traffic.gathered_bytes
    assert 1.4 < ratio < 1.5
    saved = by_mode["lockstep"].flops.total - by_mode["cached"].flops.total
    assert saved > by_mode["lockstep"].flops.reference > 0


def test_operations_are_those_of_the_metric_mfu_and_what_it_leaves_out() -> None:
    """4 a parameter and token, 2 more with a reference, 2 of recomputation; the embedding is looked up."""
    found, structure = outcome(), planner().structure(outcome().setting.workload)
    flops, tokens = found.by_mode["lockstep"].flops, 64 * 2048
    linear = structure.num_base - 152_064 * 5120 - 5120  # without embedding and final norm
    assert flops.policy + flops.reference + flops.head == 6 * linear * tokens
    assert flops.recomputation == 2 * (linear - 152_064 * 5120) * tokens
    # Causal attention: QK^T and AV, half of 2,048 keys a token; forward, recomputed, reference, and twice backward.
    assert flops.attention == (2 * 2 * 5120 * 1024 * 64) * tokens * 5


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


def test_attention_without_flash_attention_is_over_the_square_of_a_micro_batch() -> None:
    """8 responses of 2,048 tokens: 16 times the operations of half a square each; and float32 has nothing else."""
    flash, sdpa = (
        outcome(f"model.attention={name}").by_mode["lockstep"].flops for name in ("flash_attention_2", "sdpa")
    )
    assert sdpa.attention == 16 * flash.attention
    assert sdpa.policy == flash.policy
    exact = tiny("model.attention=auto", "model.dtype=float32")
    assert exact.outcome.setting.workload.attention == "packed"
    assert any("float32" in line and "bfloat16" in line for line in exact.assumptions)
    with pytest.raises(UserError, match="flash_attention_2 has no float32"):
        tiny("model.attention=flash_attention_2", "model.dtype=float32")


def test_the_planned_attention_is_one_that_the_model_has() -> None:
    """`auto` is what a run takes; Gemma 2 has no sdpa, which is refused by name."""
    folder = tiny_folder("gemma2")
    assert (
        tiny(f"model.base={folder}", "model.attention=auto", "model.dtype=float32").outcome.setting.workload.attention
        == "packed"
    )
    with pytest.raises(UserError, match=r"model\.attention: there is no sdpa for Gemma2ForCausalLM"):
        tiny(f"model.base={folder}")


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


def test_a_copy_in_every_node_is_taken_where_the_network_is_slow() -> None:
    """Behind 50 Gbit/s `zero3_node` is the fastest; behind a fast network nothing is to be changed."""
    found = plan(nodes=4, network_gbits=50)
    assert found.best_file is not None
    assert found.best_file.outcome.setting.deepspeed == "zero3_node"
    fast = plan(nodes=4, network_gbits=3200).best_file
    assert fast is not None
    assert fast.changes == ()  # everything hides behind the compute, so nothing is to be changed


@pytest.mark.parametrize("overrides", [(), ("deepspeed=zero3_offload",), ("deepspeed=zero3_cpu",)])
def test_the_file_to_take_changes_nothing_for_nothing(overrides: tuple[str, ...]) -> None:
    """Of files that are as fast the recipe's own; no other type of adapters, and none made for ranks without a GPU."""
    for gpus in (1, 2):
        best = tiny(*overrides, gpus=gpus, network_gbits=400).best_file
        assert best is not None
        assert not [change for change in best.changes if not change.startswith("deepspeed=")]
        assert best.outcome.setting.deepspeed == "zero3"
        if not overrides:
            assert best.changes == ()


def test_a_file_that_is_ruled_out_is_not_said_not_to_fit() -> None:
    """It has the memory that it needs; that is not why it is refused."""
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(rendered(tiny("deepspeed=zero3_node", gpus=4)))
    text = shown.export_text()
    assert "Ruled out: zero3_node: zero_hpz_partition_size 8 does not divide a node's 4 GPUs" in text
    assert "Does not fit" not in text
    assert text.lower().count("ruled out: ") == 1


def test_another_file_that_is_ruled_out_has_its_reason() -> None:
    """Below the table of files; the recipe itself fits."""
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(rendered(tiny(gpus=4)))
    text = shown.export_text()
    assert "ruled out: zero3_node: zero_hpz_partition_size 8 does not divide a node's 4 GPUs" in text
    assert "Ruled out: " not in text


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


def test_a_bound_is_the_largest_part_or_the_sum_without_overlap() -> None:
    """`overlap_comm: false` adds the slowest link to the compute."""
    time = outcome().by_mode["lockstep"].time
    assert time.bound_seconds == time.compute_seconds > time.nvlink_seconds
    alone = outcome(zero={"overlap_comm": False}).by_mode["lockstep"].time
    assert alone.bound_seconds == pytest.approx(time.compute_seconds + time.nvlink_seconds)
    slow = outcome(on=cluster(nodes=4, network_gbits=1)).by_mode["lockstep"].time
    assert slow.bounded_by == "network"
    assert slow.bound_seconds == slow.network_seconds


def test_fewer_tokens_at_once_hold_less_and_send_more() -> None:
    """Half the tokens of a micro-batch: twice the micro-steps and their traffic."""
    whole, half = outcome(), outcome("train.tokens_per_micro_batch=8192")
    assert half.gpu.saved_activations_bytes == pytest.approx(whole.gpu.saved_activations_bytes / 2, rel=0.01)
    assert (whole.setting.workload.micro_steps(8), half.setting.workload.micro_steps(8)) == (1, 2)
    gathered = [o.by_mode["lockstep"].traffic.gathered_bytes for o in (whole, half)]
    assert gathered[1] == 2 * gathered[0]


def test_a_step_shorter_than_a_micro_batch_is_planned_as_it_is() -> None:
    """Memory is for what a step can hold, not for what the recipe would allow."""
    few = outcome("train.examples_per_step=2").setting.workload
    assert few.largest_micro_batch == 2 * 2048
    assert replace(few, examples_per_step=64).largest_micro_batch == 16384


@pytest.mark.parametrize("tokens", [2048, 4095, 4096, 6000])
def test_micro_steps_are_those_of_the_packing(tokens: int) -> None:
    """Of 64 responses of 2,048 tokens on 8 ranks, by the function that packs them: none is cut."""
    workload = replace(outcome().setting.workload, tokens_per_micro_batch=tokens)
    expected = {2048: 8, 4095: 8, 4096: 4, 6000: 4}[tokens]
    assert workload.micro_steps(8) == fewest_micro_steps([2048] * 64, tokens, 8) == expected


def test_the_sides_of_a_pair_stay_together() -> None:
    """No micro-batch is advised that a pair does not go into, and ranks hold whole pairs."""
    overrides = ("data.sources.1.format=helpsteer2_preference", "objective.loss=dpo")
    pairs = outcome(*overrides).setting.workload
    assert pairs.least_micro_batch == 2 * 2048
    assert replace(pairs, examples_per_step=6).most_responses(4) == 2
    assert replace(pairs, tokens_per_micro_batch=3 * 2048).micro_steps(8) == 4
    found = plan(*overrides, gpus=1, gpu_memory=24)
    told = [c for remedy in found.remedies for c in remedy.changes if c.startswith("train.tokens_per_micro_batch=")]
    assert told
    assert min(int(change.partition("=")[2]) for change in told) >= 2 * 2048


def test_more_ranks_than_responses_do_not_help() -> None:
    """Whole responses go to ranks: 64 of them take 64 ranks and 128 as long, and 48 ranks as long as 32."""
    seconds = {
        nodes: outcome(on=cluster(nodes=nodes)).by_mode["lockstep"].time.compute_seconds for nodes in (4, 6, 8, 16)
    }
    assert seconds[4] == seconds[6] == pytest.approx(2 * seconds[8])
    assert seconds[16] == seconds[8]


def test_no_larger_cluster_is_offered_than_is_needed_or_has_work() -> None:
    """The first that fits ends the list; ranks without a response are not offered at all."""
    found = plan(gpus=1, gpu_memory=24)
    clusters = [remedy.outcome for remedy in found.remedies if remedy.outcome.setting.cluster.ranks > 1]
    assert [one.fits for one in clusters].count(True) <= 1
    few = replace(found.outcome.setting, workload=replace(found.outcome.setting.workload, examples_per_step=6))
    assert [one.ranks for one in larger_clusters(few)] == [2, 4]
    assert larger_clusters(found.outcome.setting)[-1].ranks == 64


def test_that_nothing_fits_is_said_of_the_largest_cluster_that_was_planned() -> None:
    """64 responses a step: 8 nodes, not any number of them."""
    shown = Console(width=200, file=io.StringIO(), record=True)
    shown.print(rendered(tiny(gpu_memory=1)))
    assert "Nothing that is known fits, on up to 8 x 8 GPUs." in shown.export_text()


@pytest.mark.parametrize(
    "option", ["gpu_memory", "host_memory", "network_gbits", "pcie_gbytes", "tflops", "nvlink_gbytes"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_figures_are_finite(option: str, value: float) -> None:
    """What is no number of bytes is refused by the option's name."""
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: {value} given"):
        cluster(**{option: value})


def test_a_card_that_is_not_known_is_planned_by_its_figures() -> None:
    """Its operations and links take the place of the named one's; without NVLink its neighbours are behind PCIe."""
    known, own = outcome(), outcome(on=cluster(tflops=98.9, nvlink_gbytes=90))
    time, slower = known.by_mode["lockstep"].time, own.by_mode["lockstep"].time
    assert slower.compute_seconds == pytest.approx(10 * time.compute_seconds)
    assert slower.nvlink_seconds == pytest.approx(5 * time.nvlink_seconds)
    on_pcie = outcome(on=cluster(nvlink_gbytes=0, pcie_gbytes=32)).by_mode["lockstep"]
    assert on_pcie.time.nvlink_seconds == pytest.approx(on_pcie.traffic.nvlink_bytes / 32e9)
    with pytest.raises(UserError, match=r"--gpu: .*--tflops"):
        cluster(gpu="l4-of-mine")


@pytest.mark.parametrize(
    ("here", "options", "expected", "assumed"),
    [
        ((), {}, ("H100 80 GB", 8, 80e9), "assumed: no GPU here; --gpu and --gpus say others"),
        ((), {"gpus": 2}, ("H100 80 GB", 2, 80e9), "assumed: no GPU here; --gpu says another"),
        ((), {"gpu": "l4"}, ("L4", 8, 24e9), "8 GPUs a node assumed (--gpus)"),
        ((), {"gpu": "l4", "gpus": 2}, ("L4", 2, 24e9), None),
        (("NVIDIA L4",) * 3, {}, ("L4", 3, 23e9), "this machine's; --gpu and --gpus name others"),
        (("NVIDIA L4",) * 3, {"gpus": 1}, ("L4", 1, 23e9), "this machine's; --gpu names another"),
        (("NVIDIA L4",), {"gpu": "h200"}, ("H200", 8, 141e9), "8 GPUs a node assumed (--gpus)"),
        (("Other",), {}, ("H100 80 GB", 8, 80e9), "assumed: Other of this machine: not one card of the table"),
        (("NVIDIA L4", "NVIDIA A10"), {}, ("H100 80 GB", 8, 80e9), "assumed: NVIDIA L4 and NVIDIA A10 of this machine"),
    ],
)
def test_what_the_options_do_not_say_is_this_machines_or_assumed(
    here: tuple[str, ...], options: dict[str, Any], expected: tuple[str, int, float], assumed: str | None
) -> None:
    """And it is said. A GPU of this machine has the memory that it reports, not that of its data sheet."""
    given = {"gpu": None, "gpus": None} | options
    cards = [Found(name, int(23e9)) for name in here]
    found = cluster_of(nodes=1, figures=Figures(network_gbits=400), here=cards, **given)
    assert (found.gpu.name, found.gpus, found.gpu_memory_bytes) == expected
    assert found.assumed == assumed or (assumed and found.assumed and found.assumed.startswith(assumed))


@pytest.mark.parametrize("name", ["v100", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti"])
def test_a_card_without_bfloat16_is_refused_as_such(name: str) -> None:
    """Not as an unknown one, whose figures could be given."""
    with pytest.raises(UserError, match=f"--gpu: {name} has no bfloat16"):
        cluster(gpu=name)


def test_bad_input_is_answered() -> None:
    """A GPU that is not known, and lengths that the recipe does not allow."""
    with pytest.raises(UserError, match=r"--gpu: .*h1000.*h100"):
        cluster(gpu="h1000")
    with pytest.raises(UserError, match=r"--tokens-per-response: 4096 given, at most data\.max_length 2048"):
        make_plan(load_settings("uft_qwen32b"), cluster(), tokens_per_response=4096)
    with pytest.raises(UserError, match=r"model\.base: 'no/such'"):
        make_plan(load_settings("uft_qwen32b", ("model.base=no/such",)), cluster())


@pytest.mark.parametrize(
    ("overrides", "has_pairs"),
    [
        ((), False),
        (("data.sources.1.format=helpsteer2_preference",), True),
        (("data.sources.1.format=helpsteer2_preference", "data.sources.1.pairs=split"), False),
        (("data.sources.0.format=jsonl",), True),
        (("data.sources.1.format=helpsteer2_preference", "objective.loss={instruction: mse, pair: dpo}"), True),
        (("objective.loss={instruction: mse, score: mse, pair: dpo}",), False),
    ],
)
def test_pairs_stay_together_whatever_their_loss(overrides: tuple[str, ...], has_pairs: bool) -> None:
    """Under mse too a pair is never divided: the least micro-batch holds both of its responses."""
    workload = workload_of(load_settings("uft_mistral7b", overrides), MISTRAL, tokens_per_response=None)
    assert workload.has_pairs == has_pairs
    assert workload.least_micro_batch == (1 + has_pairs) * workload.max_length


def test_formats_are_with_pairs_or_without() -> None:
    """A new one counts as one with pairs until it is known to give none."""
    with_pairs = {"jsonl", "trl", "helpsteer2_preference", "ultrafeedback_binarized", "hh_rlhf"}
    assert FORMATS.keys() - WITHOUT_PAIRS == with_pairs
    assert FORMATS.keys() > WITHOUT_PAIRS


def test_held_out_responses_are_cached_too() -> None:
    """The run computes their reference as well, and the disk holds it; a number that is not given leaves none."""
    given = ("data.sources.0.examples=100", "data.sources.1.examples=20", "data.held_out.0.examples=3")
    settings = load_settings("uft_mistral7b", given)
    assert len(settings.data.held_out) == 1
    assert workload_of(settings, MISTRAL, tokens_per_response=None).num_responses == 123
    unknown = load_settings("uft_mistral7b", (*given[:2], "data.held_out.0.examples=null"))
    assert workload_of(unknown, MISTRAL, tokens_per_response=None).num_responses is None


@pytest.mark.parametrize("kind", long_but(["longrope"], ["dynamic", "longrope"]))
def test_lengths_past_the_models_positions_are_refused(tmp_path: Path, kind: str) -> None:
    """As `uft train` refuses them; up to the limit there is a plan."""
    base = build_tiny_model(tmp_path, "llama", rope_parameters=rope_of(kind, 512))
    with pytest.raises(UserError, match=rf"^data\.max_length: 1024 is past the 512 positions of this model, .*{kind}"):
        plan(f"model.base={base}", "data.max_length=1024", gpus=2)
    assert plan(f"model.base={base}", "data.max_length=512", gpus=2).outcome.fits


ONE_OF_EACH = ("reward_mistral7b", "uft_online_qwen32b", "uft_full_7b")


@pytest.mark.parametrize("name", long_but(ONE_OF_EACH, shipped_recipes()))
def test_every_shipped_recipe_is_planned(name: str) -> None:
    """On a model of some kilobytes, with the recipe's own objective, reference and DeepSpeed file."""
    room = ["generator.max_new_tokens=16"] if load_settings(name).is_online else []
    found = plan(f"model.base={tiny_folder()}", "data.max_length=64", *room, gpus=2, name=name)
    assert found.outcome.fits
    assert found.best_file is not None


def test_forwards_before_a_step_are_counted() -> None:
    """`kl`: a forward of both streams more, cached or not; `reinforce`: with a cache of the policy alone.

    Answers to one prompt are compared within their micro-batch: nothing more.
    """
    plain, kl = (outcome(f"objective.reward_shift={name}") for name in ("none", "kl"))
    mean = outcome("objective.loss={instruction: mse, score: reinforce}")
    for key in ("objective.reward_shift=prompt_mean", "objective.center=prompt", "objective.loss={score: rloo}"):
        assert outcome(key).by_mode == plain.by_mode
    structure = planner().structure(plain.setting.workload)
    layer = structure.layers[30][0]
    for mode, of_plain, of_kl, of_mean in (("lockstep", 2, 3, 3), ("separate", 3, 5, 5), ("cached", 2, 3, 3)):
        for found, times in ((plain, of_plain), (kl, of_kl), (mean, of_mean)):
            gathers = planner().step_gathers(found.setting, mode)
            assert gathers is not None
            assert gathers.times[layer] == times
            assert (found.by_mode[mode].traffic.gathered_bytes > plain.by_mode[mode].traffic.gathered_bytes) is (
                found is not plain
            )
    flops = {mode: (kl.by_mode[mode].flops, mean.by_mode[mode].flops) for mode in kl.by_mode}
    a_forward = flops["lockstep"][0].reference
    assert a_forward * 2 < flops["cached"][0].reward_shift == flops["lockstep"][0].reward_shift < a_forward * 2.3
    assert a_forward < flops["cached"][1].reward_shift < a_forward * 1.15
    hbm = [found.by_mode["cached"].time.hbm_seconds for found in (plain, mean, kl)]
    assert hbm[1] == pytest.approx(hbm[0] * 4 / 3)  # forward, recomputed, backward; one more
    assert hbm[2] == pytest.approx(hbm[0] * 5 / 3)


@pytest.mark.parametrize(
    "name", long_but(["uft_mistral7b"], ["uft_mistral7b", "sft_mistral7b", "una_mistral7b", "reward_mistral7b"])
)
def test_other_recipes_are_planned(name: str) -> None:
    """7B on one GPU of 80 GB, with a reference and without."""
    found = plan(name=name, gpus=1)
    assert found.structure.num_base == 7_241_732_096
    assert found.outcome.fits


def test_a_reward_model_is_planned_without_logits() -> None:
    """A head of as many numbers as the hidden size beside the adapters, no reference, and no tile of logits."""
    reward, sft = plan(name="reward_mistral7b", gpus=8), plan(name="sft_mistral7b", gpus=8)
    assert reward.structure.num_lora - sft.structure.num_lora == 4096
    (found,), (other,) = reward.outcome.by_mode.values(), sft.outcome.by_mode.values()
    assert found.flops.head == found.flops.reference == 0 < other.flops.head
    assert reward.outcome.gpu.head_tile_bytes == 0 < sft.outcome.gpu.head_tile_bytes
    tight = plan("model.gradient_checkpointing=false", name="reward_mistral7b", gpus=1)
    assert not tight.outcome.fits
    assert tight.remedies
    assert not [change for option in tight.options for change in option.changes if "logits" in change]
