"""Whole runs whose rows are divided over ranks, with what else a recipe may ask for, against plain torch and PEFT in
float64."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mixtures import TARGETS, build_mixture
from plain_peft import StepLoss, grpo_loss, trained_by_peft, uft_loss
from plain_torch import LogRatios, assert_moved_alike, kl_of, kto, trained_by_plain_torch
from recorded_steps import steps_of_record
from runs import losses, numbers, recipe_in, settings_of_run, uft, write_rows
from test_online_run import online_recipe
from transformers import AutoConfig, AutoModelForCausalLM
from wrappers import build_wrapper

from uft_ds.architectures.facts import attention_parity
from uft_ds.data.mixture import Step
from uft_ds.data.packing import Packing, rank_micro_batches
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import open_data
from uft_ds.training.steps import steps_of

pytestmark = pytest.mark.long
"""Without whole runs: gradients in `test_sequence_parallel.py`, steps of KTO in `test_mixed_steps.py`, answers in
`test_builtin_generator.py`, reward models in `test_reward_head.py`."""

TWO = ("launch.ranks=2", "launch.sequence_parallel=2")
FOUR = ("launch.ranks=4", "launch.sequence_parallel=2")
BAD = 0.5
"""Weight of responses that are labelled bad."""


def kto_recipe(folder: Path, base: Path, shift: str) -> Path:
    """All parameters trained by KTO on labelled responses of uneven length."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"Say {i}", "response": ("yes " if i % 3 else "no ") * (1 + i % 5), "label": i % 3 != 0}
        for i in range(32)
    ]
    objective = {"loss": "l1", "beta": 0.1, "undesirable_weight": BAD, "reward_shift": shift}
    return recipe_in(
        folder,
        base,
        lora=None,
        objective=objective,
        train__lr=1e-3,
        data__sources=[{"format": "jsonl", "path": str(write_rows(folder / "labelled.jsonl", rows[:26]))}],
        data__held_out=[{"format": "jsonl", "path": str(write_rows(folder / "labelled_held_out.jsonl", rows[26:]))}],
    )


def crossing(settings: Settings, steps: Seq[Step], data_ranks: int) -> int:
    """How many responses of these steps have supervised tokens in both halves of their row."""
    packing = Packing(attention_parity(AutoConfig.from_pretrained(settings.model.base)), settings.data.share_prompts, 2)
    tokens, found = 2 * settings.train.tokens_per_micro_batch, 0
    for step in steps:
        for rank in range(data_ranks):
            for row in rank_micro_batches(
                step, tokens_per_micro_batch=tokens, rank=rank, world_size=data_ranks, packing=packing
            ):
                is_first_N = row.host_predictors_N < -(-len(row.token_ids_T) // 2)
                found += len(set(row.response_of_N[is_first_N].tolist()) & set(row.response_of_N[~is_first_N].tolist()))
    return found


@pytest.mark.parametrize(
    ("shift", "options"),
    [("kl", (*TWO, "model.gradient_checkpointing=selective")), ("none", FOUR)],
    ids=["beside a copy of the base", "from the cache, four ranks"],
)
def test_kto_of_all_parameters_is_that_of_plain_torch(
    tiny_qwen2: Path, tmp_path: Path, shift: str, options: tuple[str, ...]
) -> None:
    """Losses of all steps, how far each parameter moved, and KTO's reference point of mismatched pairs."""
    run = tmp_path / "run"
    result = uft("train", str(kto_recipe(tmp_path, tiny_qwen2, shift)), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("loading the reference" in result.stdout) == (shift == "kl")
    settings, shifts = settings_of_run(run / "recipe.yaml"), []
    assert (settings.launch.sequence_parallel, settings.trains_all) == (2, True)
    plan = steps_of(settings, open_data(settings, RunFolder(run)))
    steps = [plan.step(number) for number in range(len(plan))]
    assert crossing(settings, steps, settings.launch.ranks // 2) > 0

    def shift_of(step: Step, log_ratios: LogRatios) -> float:
        shifts.append(kl_of(step, log_ratios) if shift == "kl" else 0.0)
        return shifts[-1]

    expected, expected_losses = trained_by_plain_torch(settings, steps, len(steps), shift_of=shift_of, terms=kto(BAD))
    assert losses(run) == pytest.approx(expected_losses, rel=1e-5)
    if shift == "kl":
        recorded = [line["reward_shift"] for line in numbers(run) if "reward_shift" in line]
        assert recorded == pytest.approx([0.1 * nats for nats in shifts], rel=1e-4, abs=1e-9)
        assert max(shifts) > 0.1
    result = uft("convert", str(run), str(tmp_path / "model"))
    assert result.returncode == 0, result.stderr
    model, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", tiny_qwen2))
    assert_moved_alike(model, expected, start)


@pytest.mark.parametrize("options", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_an_online_run_of_all_parameters_is_that_of_plain_torch(
    tiny_qwen2: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """On the answers that it has recorded, beside fixed data; and while it is trained, it answers held-out prompts."""
    keys = {"train__lr": 1e-3, "train__tokens_per_micro_batch": 40}  # rows of three sequences, whose middle is crossed
    recipe = online_recipe(tmp_path, tiny_qwen2, lora=None, objective__reward_shift="none", **keys)
    run = tmp_path / "run"
    result = uft("train", str(recipe), "train.samples=3", *options, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    settings = settings_of_run(run / "recipe.yaml")
    steps = steps_of_record(settings, run)
    assert crossing(settings, steps, int(settings.launch.ranks) // 2) > 0
    _, expected = trained_by_plain_torch(settings, steps, len(steps))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    lines = [line for line in numbers(run) if "rollouts/score" in line]
    assert lines[0]["log_ratio/score"] == 0.0
    assert lines[-1]["rollouts/kl"] != 0.0


def test_an_online_run_of_adapters_is_the_undivided_one(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Two ranks that share every row give the answers and the losses of one rank that has them alone."""
    found: dict[str, Any] = {}
    for name, options in {"alone": ("launch.ranks=1",), "divided": TWO}.items():
        recipe = online_recipe(tmp_path / name, tiny_qwen2)
        result = uft("train", str(recipe), *options, PYTHONPATH=str(tmp_path / name))
        assert result.returncode == 0, result.stdout + result.stderr
        run = tmp_path / name / "run"
        answers = [
            response.origin.rpartition("/")[2] + str(sequence.token_ids_T.tolist())
            for step in steps_of_record(settings_of_run(run / "recipe.yaml"), run)
            for sequence in step.sequences
            for response in sequence.responses
        ]
        found[name] = answers, losses(run)
    assert found["divided"][0] == found["alone"][0]
    assert found["divided"][1] == pytest.approx(found["alone"][1], rel=1e-5)


GRPO = {
    "loss": {"instruction": "mse", "score": "grpo"},
    "beta": {"instruction": 0.01, "score": 0.05},
}
OTHERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], StepLoss]] = {
    "experts, grpo": (
        partial(build_mixture, family="qwen3_moe"),
        {"lora": {"rank": 4, "alpha": 8.0, "targets": TARGETS}, "objective": GRPO},
        grpo_loss,
    ),
    "gemma3 with images, selective": (
        partial(build_wrapper, name="gemma3"),
        {"model__gradient_checkpointing": "selective"},
        uft_loss,
    ),
}
"""How a base is built, keys of the recipe, and the loss of its steps."""


@pytest.mark.parametrize("name", OTHERS)
def test_an_online_run_on_another_base_is_that_of_peft(tmp_path: Path, name: str) -> None:
    """A mixture of experts and a model of images and text, on the answers that they have given and recorded."""
    build, keys, loss_of = OTHERS[name]
    recipe = online_recipe(tmp_path, build(tmp_path / "base"), train__tokens_per_micro_batch=40, **keys)
    run = tmp_path / "run"
    result = uft("train", str(recipe), *TWO, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    settings = settings_of_run(run / "recipe.yaml")
    steps = steps_of_record(settings, run)
    assert crossing(settings, steps, 1) > 0
    expected = trained_by_peft(settings, steps, run / "checkpoints" / "step-000000" / "adapter", loss_of)
    assert losses(run) == pytest.approx(expected, rel=1e-5, abs=1e-5)
