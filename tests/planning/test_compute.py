"""Operations of a plan and the time they bound, by hand."""

import pytest
from plans import cluster, outcome, planner, tiny, tiny_folder

from uft_ds.errors import UserError


def test_operations_are_those_of_the_metric_mfu_and_what_it_leaves_out() -> None:
    """4 a parameter and token, 2 more with a reference, 2 of recomputation; the embedding is looked up."""
    found, structure = outcome(), planner().structure(outcome().setting.workload)
    flops, tokens = found.by_mode["lockstep"].flops, 64 * 2048
    linear = structure.num_base - 152_064 * 5120 - 5120  # without embedding and final norm
    assert flops.policy + flops.reference + flops.head == 6 * linear * tokens
    assert flops.recomputation == 2 * (linear - 152_064 * 5120) * tokens
    # Causal attention: QK^T and AV, half of 2,048 keys a token; forward, recomputed, reference, and twice backward.
    assert flops.attention == (2 * 2 * 5120 * 1024 * 64) * tokens * 5


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


def test_a_bound_is_the_largest_part_or_the_sum_without_overlap() -> None:
    """`overlap_comm: false` adds the slowest link to the compute."""
    time = outcome().by_mode["lockstep"].time
    assert time.bound_seconds == time.compute_seconds > time.nvlink_seconds
    alone = outcome(zero={"overlap_comm": False}).by_mode["lockstep"].time
    assert alone.bound_seconds == pytest.approx(time.compute_seconds + time.nvlink_seconds)
    slow = outcome(on=cluster(nodes=4, network_gbits=1)).by_mode["lockstep"].time
    assert slow.bounded_by == "network"
    assert slow.bound_seconds == slow.network_seconds


def test_more_ranks_than_responses_do_not_help() -> None:
    """Whole responses go to ranks: 64 of them take 64 ranks and 128 as long, and 48 ranks as long as 32."""
    seconds = {
        nodes: outcome(on=cluster(nodes=nodes)).by_mode["lockstep"].time.compute_seconds for nodes in (4, 6, 8, 16)
    }
    assert seconds[4] == seconds[6] == pytest.approx(2 * seconds[8])
    assert seconds[16] == seconds[8]


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
