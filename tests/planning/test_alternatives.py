"""What a plan says to change: the file to take, the remedies, their combination, larger clusters."""

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from plans import plan, tiny
from rich.console import Console

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.planning.alternatives import larger_clusters
from uft_ds.planning.table import rendered
from uft_ds.planning.values import as_json


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
