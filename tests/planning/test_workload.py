"""Micro-steps, pairs and responses of a planned step."""

from dataclasses import replace

import pytest
from plans import MISTRAL, outcome, plan

from uft_ds.data.bins import fewest_micro_steps
from uft_ds.data.formats.table import FORMATS
from uft_ds.planning.workload import WITHOUT_PAIRS, workload_of
from uft_ds.recipe.to_settings import load_settings


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
