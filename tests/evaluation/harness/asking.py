"""Small tasks of our own for lm-evaluation-harness, a tiny adapter, and `uft eval` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import needs
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from uft_ds.cli import app
from uft_ds.evaluation.results import Evaluation, ItemResult, read_evaluation, read_items

needs.installed("lm_eval", "pip install '.[eval]' brings it")

WORDS = ("red", "green", "blue", "black", "white", "grey", "pink")


def stub_tasks(folder: Path, count: int = 7) -> str:
    """Two task files, of choices and of answers, as `--suite` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"Which {'very ' * (i % 4)}colour is {word}?", "choices": list(WORDS[: 2 + i % 3]), "right": i % 2}
        for i, word in zip(range(count), WORDS * count, strict=False)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_all: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(folder / "rows.jsonl"), "test": str(folder / "rows.jsonl")}},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "metadata": {"version": 2.0},
    }
    acc = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    pick = of_all | {
        "task": "pick",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metric_list": acc,
    }
    say = of_all | {
        "task": "say",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "first",
                "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
            },
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    }
    for tree in (pick, say):
        (folder / f"{tree['task']}.yaml").write_text(yaml.safe_dump(tree))
    return f"{folder / 'pick.yaml'}=1,{folder / 'say.yaml'}=0"


def rolling_task(folder: Path) -> Path:
    """A task file of two texts that are scored whole, as wikitext's are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.jsonl").write_text('{"text": "red and green"}\n{"text": "grey"}\n')
    tree = {
        "task": "roll",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
        "metadata": {"version": 1},
    }
    (folder / "roll.yaml").write_text(yaml.safe_dump(tree))
    return folder / "roll.yaml"


def tiny_adapter(base: Path, folder: Path) -> Path:
    """A random adapter that changes the tiny model's answers."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def uft_eval(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def evaluated(folder: Path, *arguments: object) -> Evaluation:
    """`uft eval` to its end, with its results at `folder`."""
    result = uft_eval(*arguments, "--out", folder)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return read_evaluation(folder)


def numbers(found: Evaluation) -> dict[str, dict[str, float]]:
    return {task.task: dict(task.metrics) for task in found.tasks}


def items_of(folder: Path) -> dict[str, list[ItemResult]]:
    return {path.stem: read_items(folder, path.stem) for path in sorted((folder / "items").iterdir())}
