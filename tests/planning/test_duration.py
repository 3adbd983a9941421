"""How much a run trains on and how long it takes: counted in the token cache, or as the recipe states it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from sources import write_rows

from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.planning.amount import Amount, amount_of
from uft_ds.planning.duration import ASSUMED_MFU, Mfu, duration_of, mfu_of
from uft_ds.planning.hardware import Figures, cluster_of
from uft_ds.planning.plan import Plan, make_plan
from uft_ds.planning.table import said_of
from uft_ds.recipe.file import dump_recipe, load_recipe, recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings, settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import prepare_data
from uft_ds.run.preview import amount_line
from uft_ds.training.steps import steps_of

H100 = cluster_of(nodes=1, gpus=2, gpu="h100", figures=Figures(network_gbits=400))


def recipe(base: Path, folder: Path, *, pairs: bool = False, **train: Any) -> Settings:
    """Two local sources of 100 and 60 rows, of which the second is 30% of all responses; lengths differ by row.

    Args:
        pairs: whether the rows of the first one are 50 pairs.
    """
    sources = []
    for number, (rows, portion) in enumerate(((100, {}), (60, {"share": 0.3}))):
        written = [{"prompt": f"q{number} {i}", "response": "a" * (1 + i % 7)} for i in range(rows)]
        if pairs and number == 0:
            written = [{"prompt": f"q{i}", "chosen": "a" * (1 + i % 7), "rejected": "b"} for i in range(rows // 2)]
        sources.append({"format": "jsonl", "path": str(write_rows(folder / f"{number}.jsonl", written)), **portion})
    data = {"sources": sources, "cache_dir": str(folder / "tokens"), "max_length": 256, "workers": 1}
    tree = {
        "name": "x",
        "model": {"base": str(base), "attention": "sdpa"},
        "data": data,
        "train": {"examples_per_step": 8, "tokens_per_micro_batch": 512, **train},
        "output": str(folder / "run"),
    }
    return settings_of(recipe_from_tree(tree, "x"))


def tokenised(settings: Settings) -> Settings:
    prepare_data(settings, load_tokenizer(settings.model.base))
    return settings


@pytest.mark.parametrize(
    "train", [{}, {"epochs": 3}, {"steps": 7}, {"steps": 7, "examples_per_step": 9, "pairs": True}]
)
def test_tokenised_data_is_counted(tiny_qwen2: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    """As many steps and responses as the run will have, pairs being whole, in the words of a dry run; tokens to a
    percent of those that its steps hold; nothing without a cache."""
    settings = recipe(tiny_qwen2, tmp_path, **train)
    assert (amount_of(settings) is None) is ("steps" not in train)
    found = amount_of(tokenised(settings))
    data = prepare_data(settings, load_tokenizer(settings.model.base))
    steps = steps_of(settings, data)
    sequences = [sequence for step in steps for sequence in step.sequences]
    assert found is not None
    assert found.counted_from == "token cache"
    assert found.steps == len(steps)
    assert found.responses == len(sequences)
    assert (found.responses > 7 * settings.train.examples_per_step) is ("pairs" in train or "steps" not in train)
    assert f"{found.responses:,} responses in all, {found.epochs:.3g} epoch" in amount_line(steps, data).plain
    assert found.tokens == pytest.approx(sum(sequence.num_tokens for sequence in sequences), rel=0.01)
    # 100 responses and 30% of all: 100 / 0.7.
    expected = found.responses * 0.7 / 100 if "steps" in train else train.get("epochs", 1)
    assert found.epochs == pytest.approx(expected, rel=0.01)


def test_a_plan_of_tokenised_data_is_of_its_mean_length(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Not of data.max_length; a length that is given wins."""
    settings = recipe(tiny_qwen2, tmp_path)
    assert make_plan(settings, H100).outcome.setting.workload.tokens_per_response == 256
    counted = make_plan(tokenised(settings), H100)
    amount = counted.duration.amount
    assert amount is not None
    assert amount.tokens is not None
    mean = counted.outcome.setting.workload.tokens_per_response
    assert mean == math.ceil(amount.tokens / amount.responses) < 256
    assert f"A run by the tokenised data: 143 responses, {amount.tokens:,} tokens, 18 steps, 1 epoch." in said_of(
        counted
    )
    given = make_plan(settings, H100, tokens_per_response=200)
    assert given.outcome.setting.workload.tokens_per_response == 200
    assert "143 responses of 200 tokens, 18 steps" in said_of(given)
    some = make_plan(recipe(tiny_qwen2, tmp_path, steps=7, examples_per_step=9, pairs=True), H100)
    assert "by the recipe: at least 63 responses of 256 tokens (data.max_length, the most there can be), 7 steps. " in (
        said_of(some)
    )


@pytest.mark.parametrize(
    ("overrides", "responses", "steps", "epochs"),
    [
        ((), 40_000, 625, 1),
        (("train.epochs=2",), 80_000, 1250, 2),
        (("train.steps=10",), 640, 10, 0.016),
        (("data.sources.0.examples=null", "train.steps=10"), 640, 10, None),
        (("data.sources.0.epochs=0.5",), 30_000, 469, 1),
        (("data.sources.1.share=0.2",), 25_000, 391, 1),
    ],
)
def test_else_the_recipe_states_it(
    overrides: tuple[str, ...], responses: int, steps: int, epochs: float | None
) -> None:
    """20,000 responses of each of two sources, 64 a step; a share of 0.2 beside 20,000 makes 25,000."""
    states_steps = any("train.steps" in override for override in overrides)
    expected = Amount(responses, steps, epochs, None, "recipe", states_steps)
    assert amount_of(load_settings("uft_mistral7b", overrides)) == expected


def test_what_nobody_states_is_not_guessed(tiny_qwen2: Path, tmp_path: Path) -> None:
    """No examples, no steps, no tokens in the cache: the step's time alone, and what would tell more."""
    settings = recipe(tiny_qwen2, tmp_path)
    found = make_plan(settings, H100)
    assert found.duration.amount is None
    assert found.duration.bound_seconds is None
    assert "How long a run takes is not known" in said_of(found)
    assert re.search(r"A step takes at least \d(\.\d)?e-\d+ s\.$", said_of(found)), "0.00 s would say nothing"


def shipped(*overrides: str, mfu: float | None = None, **options: Any) -> Plan:
    cluster = cluster_of(nodes=1, gpus=8, gpu="h100", figures=Figures(network_gbits=400, **options))
    return make_plan(load_settings("uft_mistral7b", overrides), cluster, mfu=mfu)


def test_times_are_those_of_the_steps(tmp_path: Path) -> None:
    """The bound is that of a step, times the steps. The forecast is operations over the share of the peak:
    6 x 7.28e9 parameters x 131,072 tokens / (0.4 x 8 x 989e12) = 1.81 s a step."""
    output = f"output={tmp_path}"
    found = shipped(output, mfu=0.4)
    outcome, duration = found.outcome, found.duration
    assert duration.bound_seconds == pytest.approx(625 * outcome.bound_seconds)
    expected = 6 * (7_241_732_096 + 41_943_040) * 64 * 2048 / (0.4 * 8 * 989e12)
    assert duration.forecast_seconds == pytest.approx(625 * expected)
    assert "at an MFU of 0.40." in said_of(found)
    # From the second epoch on the reference is cached: 4 operations in place of 6, and a shorter least step.
    twice = shipped(output, "train.epochs=2", mfu=0.4).duration
    assert twice.forecast_seconds == pytest.approx(625 * expected * (1 + 4 / 6))
    cached = outcome.by_mode["cached"].time.bound_seconds
    assert twice.bound_seconds == pytest.approx(625 * (outcome.bound_seconds + cached))
    always = shipped(output, "train.epochs=2", "reference.cache=false", mfu=0.4).duration
    assert always.forecast_seconds == pytest.approx(2 * 625 * expected)


def test_a_short_time_is_a_number(tmp_path: Path) -> None:
    """ "At least less than 1 s" would say nothing."""
    said = said_of(shipped(f"output={tmp_path}", "train.steps=1", "train.examples_per_step=8", mfu=1.0))
    assert re.search(r"takes at least 0\.\d+ s; ", said), said


def test_the_time_of_what_does_not_fit_is_that_of_what_to_take(tmp_path: Path) -> None:
    """On one GPU of 18.5 GB with slow PCIe only offloading fits: its 117 s a step, not the recipe's 8 s."""
    options = Figures(network_gbits=400, gpu_memory=18.5, pcie_gbytes=2)
    cluster = cluster_of(nodes=1, gpus=1, gpu="h100", figures=options)
    found = make_plan(load_settings("uft_mistral7b", (f"output={tmp_path}",)), cluster)
    assert found.answer is not None
    assert found.answer.outcome.bound_seconds > 10 * found.outcome.bound_seconds
    assert found.duration.bound_seconds == pytest.approx(625 * found.answer.outcome.bound_seconds)
    assert "So changed it takes at least 20 h" in said_of(found)


def test_no_forecast_is_below_the_bound(tmp_path: Path) -> None:
    """An MFU that recomputation or a link does not allow is not promised."""
    found = shipped(f"output={tmp_path}", mfu=1.0)
    assert found.duration.forecast_seconds == found.duration.bound_seconds
    assert "an MFU of 1.00 is out of reach, compute bounds it." in said_of(found)


def test_an_assumed_share_of_the_peak_is_said_to_be_assumed(tmp_path: Path) -> None:
    """In the sentence and in the assumptions; float32, whose peak is not known, gets no forecast at all."""
    found = shipped(f"output={tmp_path}")
    assert found.duration.mfu == Mfu(ASSUMED_MFU, "assumed")
    assert "at an MFU of 0.30, which is assumed (--mfu)" in said_of(found)
    assert any("MFU of 0.30 is no measurement" in line for line in found.assumptions)
    exact = shipped("model.dtype=float32", f"output={tmp_path}")
    assert exact.duration.bound_seconds is not None
    assert exact.duration.forecast_seconds is None
    assert "no forecast for float32 without --tflops" in said_of(exact)
    told = shipped("model.dtype=float32", f"output={tmp_path}", tflops=60)
    assert told.duration.forecast_seconds is not None


def test_a_measured_share_of_the_peak_is_taken(tmp_path: Path) -> None:
    """From the run in the output folder: the median of its steps after the first three; not of another base."""
    overrides = ("train.steps=10", f"output={tmp_path}")
    folder = RunFolder(tmp_path)
    folder.recipe.write_text(dump_recipe(load_recipe("uft_mistral7b", overrides)))
    lines = [{"step": n, "loss": 1.0, "mfu": value} for n, value in enumerate((0.01, 0.02, 0.03, 0.2, 0.4, 0.22), 1)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 6, "held_out/loss": 1.0}]))
    settings = load_settings("uft_mistral7b", overrides)
    assert mfu_of(settings, None) == Mfu(0.22, "measured", tmp_path)
    assert mfu_of(settings, 0.5) == Mfu(0.5, "option")
    assert f"at an MFU of 0.22, which {tmp_path} measured" in said_of(shipped(*overrides))
    other = load_settings("uft_mistral7b", (*overrides, "model.base=mistralai/Mistral-7B-v0.3"))
    assert mfu_of(other, None).origin == "assumed"
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert mfu_of(settings, None).origin == "assumed"


@pytest.mark.parametrize("value", [0.0, -0.1, 40.0, float("nan"), float("inf")])
def test_a_share_of_the_peak_is_a_share(value: float) -> None:
    """40 is no share: percent are not taken."""
    with pytest.raises(UserError, match=r"--mfu: .* expected a share of the peak, above 0 and at most 1"):
        mfu_of(load_settings("uft_mistral7b"), value)


def test_a_last_step_that_is_not_full_counts_as_its_part() -> None:
    """100 responses are 1.5625 steps of 64, not two: the bound stays one."""
    found = shipped()
    few = duration_of(found.outcome, found.structure, Amount(100, 2, 1.0, None, "recipe"), Mfu(0.4, "option"))
    assert few.bound_seconds == pytest.approx(100 / 64 * found.outcome.bound_seconds)
