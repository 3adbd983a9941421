"""A reward model from a recipe: trained, killed and resumed, converted, and loaded by Hugging Face alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import TARGETS, build_mixture
from peft import PeftModel
from runs import adapter, assert_same_run, killed_at, recipe_in, run, settings_of_run, uft, write_rows
from safetensors.torch import load_file
from tiny import build_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from wrappers import build_wrapper

from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.reward_model import convert_to_reward_model
from uft_ds.record.metrics_file import read_metrics
from uft_ds.run.prepare import check_run

PROMPT = "Which one"


def pair(number: int) -> dict[str, Any]:
    chosen, rejected = "yes " * (1 + number % 4), "no " * (1 + number % 3)
    scores = {"score_chosen": 0.9, "score_rejected": 0.1 * (number % 5)}
    return {"prompt": f"{PROMPT} {number}", "chosen": chosen, "rejected": rejected, **scores}


def recipe_of_reward_model(folder: Path, base: Path, **changes: Any) -> Path:
    """Pairs and scored answers, on two ranks, with all that a reward model's objective has."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = [{"prompt": f"Rate {i}", "response": "no " * (1 + i % 3), "score": i % 3 / 2} for i in range(16)]

    def source(name: str, rows: list[dict[str, Any]]) -> dict[str, str]:
        return {"format": "jsonl", "path": str(write_rows(folder / f"{name}.jsonl", rows))}

    objective = {"pair": "bradley_terry", "score": "mse"}
    values: dict[str, Any] = {
        "data__sources": [source("pairs", [pair(i) for i in range(24)]), source("rated", scored)],
        "data__held_out": [source("held_pairs", [pair(i) for i in range(24, 32)])],
        "objective": {"reward": "head", "loss": objective, "margin": "scores", "centering": 0.01},
        "objective__reward_shift": "none",
        "reference": {},
        "train__head_lr": 5e-3,
        "train__tokens_per_micro_batch": 128,
        "train__keep_best": "held_out/pair_accuracy/pair",
    }
    return recipe_in(folder, base, **(values | changes))


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    result = uft("train", str(recipe_of_reward_model(folder, tiny_qwen2)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def converted(unbroken: Path) -> Path:
    result = uft("convert", str(unbroken), str(unbroken.parent / "model"), "--to", "reward-model")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "100.00% of the adapter's changes of rewards kept on 16 responses" in result.stdout
    return unbroken.parent / "model"


def test_a_reward_model_learns_which_answer_is_better(unbroken: Path) -> None:
    """Held-out pairs it has not seen; both groups are trained, and nothing is said of a policy."""
    lines = [line for line in read_metrics(unbroken / "metrics.jsonl") if "held_out/loss" in line]
    first, last = lines[0], lines[-1]
    assert abs(first["held_out/pair_margin/pair"]) < 0.1, "rewards begin near 0"
    assert last["held_out/loss"] < first["held_out/loss"] - 0.1
    assert last["held_out/pair_accuracy/pair"] == 1.0
    assert not [name for name in last if "log_ratio" in name or "implicit" in name or "entropy" in name]
    assert all(math.isfinite(value) for value in last.values())
    assert (unbroken / "report.html").exists()
    assert (unbroken / "health.png").exists()


@pytest.mark.long
def test_invariant_4_a_killed_reward_model_goes_on_bit_for_bit(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Metrics, adapter and head, with two groups of parameters in the optimiser."""
    recipe = recipe_of_reward_model(tmp_path, tiny_qwen2)
    killed_at(recipe, 5)
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "run", unbroken)
    assert "base_model.model.score.weight" in adapter(unbroken)


def rewards_of_run(folder: Path) -> list[float]:
    """Of the engine, packed, at the last evaluation: chosen and rejected of each held-out pair in turn."""
    with (folder / "held_out.csv").open(encoding="utf-8") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: line["origin"])
    return [float(line["implicit_reward"]) for line in lines]


def texts(tokenizer: Any) -> list[str]:
    rows = [(i, side) for i in range(24, 32) for side in ("chosen", "rejected")]
    conversations = [
        [{"role": "user", "content": f"{PROMPT} {i}"}, {"role": "assistant", "content": pair(i)[side]}]
        for i, side in rows
    ]
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]


def scores(model: Any, tokenizer: Any, rows: list[str], **options: Any) -> torch.Tensor:
    batch = tokenizer(rows, return_tensors="pt", add_special_tokens=False, **options)
    with torch.no_grad():
        return torch.as_tensor(model.eval()(**batch).logits[:, 0])


def check_scores(model: Any, tokenizer: Any, expected: list[float]) -> None:
    rows = texts(tokenizer)
    alone = torch.cat([scores(model, tokenizer, [row]) for row in rows])
    torch.testing.assert_close(alone, torch.tensor(expected), rtol=0, atol=1e-5)
    for side in ("right", "left"):
        padded = scores(model, tokenizer, rows, padding=True, padding_side=side)
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_hugging_face_scores_as_the_run_did(unbroken: Path, converted: Path) -> None:
    """By nothing but transformers: alone and in padded batches of either side, to 1e-5. The base's own padding token
    ends each answer, and its template writes a line break after it: both would read the wrong token."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForSequenceClassification.from_pretrained(converted, dtype=torch.float32)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert texts(tokenizer)[0].endswith("yes <|im_end|>")
    check_scores(model, tokenizer, rewards_of_run(unbroken))
    assert not [name for name in load_file(converted / "model.safetensors") if "lm_head" in name]
    assert "text-classification" in (converted / "README.md").read_text()


def test_peft_loads_the_adapter_with_its_head(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """`--to adapter` on the base's classifier gives the same scores; and so does a checkpoint's own folder."""
    result = uft("convert", str(unbroken), str(tmp_path / "adapter"), "--to", "adapter")
    assert result.returncode == 0, result.stdout + result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_qwen2, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    check_scores(model, tokenizer, rewards_of_run(unbroken))


def test_a_reward_model_is_converted_to_nothing_else(unbroken: Path, tmp_path: Path) -> None:
    """And a policy to no reward model; nothing is left behind."""
    for options, message in (
        ((), "a reward model, which generates nothing; take --to reward-model"),
        (("--to", "universal"), "a reward model, whose head has a learning rate of its own"),
    ):
        result = uft("convert", str(unbroken), str(tmp_path / "out"), *options)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    recipe = tmp_path / "run" / "recipe.yaml"
    run("cp", "-r", str(unbroken), str(tmp_path / "run"))
    text = recipe.read_text()
    assert "reward: head" in text
    recipe.write_text(
        text.replace("reward: head", "reward: implicit")
        .replace("bradley_terry", "dpo")
        .replace("margin: scores", "margin: none")
        .replace("centering: 0.01", "centering: 0.0")
        .replace("head_lr: 0.005", "head_lr: null")
    )
    result = uft("convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "reward-model")
    assert (result.returncode, "holds no reward model" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_the_wrong_token_is_refused(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the end of the turn as padding token, transformers would read the token before it: seen before the folder
    appears."""
    for module in ("uft_ds.export.reward_model", "uft_ds.data.tokens.padding"):
        monkeypatch.setattr(f"{module}.padding_id", lambda chat: chat.end_of_turn_id)
    with pytest.raises(CheckFailed, match="of the adapter's changes of rewards kept on 16 responses"):
        convert_to_reward_model(unbroken, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_classifier_is_refused_before_the_launch(tmp_path: Path) -> None:
    """Granite has none in transformers; nothing is written."""
    base = build_tiny_model(tmp_path / "granite", "granite")
    result = uft("train", str(recipe_of_reward_model(tmp_path / "run", base)))
    assert result.returncode == 2
    assert "objective.reward: head needs a sequence classifier of transformers" in result.stderr
    assert not (tmp_path / "run" / "run").exists()


@pytest.mark.parametrize("name", ["olmoe", "mistral3", "qwen2_5_vl"])
def test_a_mixture_or_a_wrapper_without_a_classifier_is_refused(tmp_path: Path, name: str) -> None:
    """Though a causal model of the same text model may have one; nothing is written."""
    base = (build_mixture if name == "olmoe" else build_wrapper)(tmp_path / "base", name)
    recipe = recipe_of_reward_model(tmp_path, base, lora={"rank": 4, "alpha": 8.0, "targets": TARGETS})
    with pytest.raises(UserError, match=r"^objective\.reward: head needs a sequence classifier .* has none .*; take a"):
        check_run(settings_of_run(recipe))
    assert not (tmp_path / "run").exists()


def others() -> dict[str, tuple[Callable[[Path], Path], dict[str, Any], tuple[str, ...]]]:
    """How a base is built, keys of the recipe, and options of the run."""
    lora = {"rank": 4, "alpha": 8.0, "targets": TARGETS}
    divided = ("launch.sequence_parallel=2", "model.gradient_checkpointing=selective")
    return {
        "experts": (partial(build_mixture, family="qwen3_moe"), {"lora": lora}, ()),
        "experts, divided rows": (partial(build_mixture, family="qwen3_moe"), {"lora": lora}, divided),
        "nf4": (build_tiny_model, {"model__quantization": "nf4"}, ("model.gradient_checkpointing=selective",)),
        "gemma3 with images": (partial(build_wrapper, name="gemma3"), {}, ()),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", others())
def test_hugging_face_scores_as_a_run_on_another_base_did(tmp_path: Path, name: str) -> None:
    """A mixture of experts, rows that two ranks share, a base in NF4, a model of images and text: held-out pairs are
    learned, and the converted model gives the rewards of the run by nothing but transformers, to 1e-5."""
    build, keys, options = others()[name]
    result = uft("train", str(recipe_of_reward_model(tmp_path, build(tmp_path / "base"), **keys)), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    held_out = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out/loss" in line]
    assert held_out[-1]["held_out/loss"] < held_out[0]["held_out/loss"] - 0.1
    result = uft("convert", str(tmp_path / "run"), str(tmp_path / "model"), "--to", "reward-model")
    assert result.returncode == 0, result.stdout + result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rewards = rewards_of_run(tmp_path / "run")
    assert torch.tensor(rewards).std() > 0.1
    check_scores(model, tokenizer, rewards)


@pytest.mark.long
def test_a_reward_model_starts_from_a_policys_adapter(tiny_qwen2: Path, tmp_path: Path) -> None:
    """An SFT run's: checked as any start is, then trained on."""
    first = recipe_in(
        tmp_path / "sft", tiny_qwen2, train__steps=2, objective={"loss": "nll"}, objective__reward_shift="none"
    )
    assert uft("train", str(first)).returncode == 0
    recipe = recipe_of_reward_model(
        tmp_path / "rm", tiny_qwen2, train__steps=2, start={"adapter": str(tmp_path / "sft" / "run")}
    )
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "before the first step: the log-ratios of start.adapter are" in result.stdout
