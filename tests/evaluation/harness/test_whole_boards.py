"""Both leaderboards whole, on made-up rows: all of the paper's columns, by the harness's own numbers of each task."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import made_up_rows
import pytest
import torch
from asking import numbers, uft_eval
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import build_tiny_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.commands.shared import console
from uft_ds.evaluation.harness import package
from uft_ds.evaluation.results import read_evaluation

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::UserWarning")]

NEW_TOKENS = 8
ASKED: Mapping[str, Mapping[str, int | None]] = {
    "openllm": {"gsm8k": 5, "truthfulqa_mc2": 0, "winogrande": 5, "arc_challenge": 25, "hellaswag": 10, "mmlu": 5},
    "leaderboard": dict.fromkeys(
        f"leaderboard_{name}" for name in ("bbh", "gpqa", "mmlu_pro", "musr", "ifeval", "math_hard")
    ),
}
"""The paper's shots; None: those of the harness's own task files, which are the second leaderboard's."""
ROWS = {"openllm": made_up_rows.openllm, "leaderboard": made_up_rows.leaderboard}
IFEVAL = [f"{level}_level_{way}_acc,none" for level in ("prompt", "inst") for way in ("strict", "loose")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says `made_up_rows.ANSWER`, a single token, after a colon, and ends there.

    The embedding of each of the two tokens has a direction that the next one's row of the head has too.
    """
    folder = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=16384)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=16384)
    tokenizer.add_tokens([AddedToken(made_up_rows.ANSWER, normalized=False)])
    tokenizer.save_pretrained(folder)
    made = AutoModelForCausalLM.from_pretrained(folder)
    made.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding, head = made.get_input_embeddings().weight.data, made.get_output_embeddings().weight.data
    (colon,), (answer,) = (tokenizer(text)["input_ids"] for text in (":", made_up_rows.ANSWER))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for token, following in ((colon, answer), (answer, tokenizer.eos_token_id)):
            direction = torch.nn.functional.normalize(torch.randn(embedding.shape[1]), dim=0)
            embedding[token] += 10 * direction
            head[following] = 10 * direction
    made.save_pretrained(folder)
    return folder


def harness_alone(model: Path, board: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the harness's own evaluation of each task gives, which reads the same rows from a stand-in of the hub."""
    folders = ("leaderboard", "gsm8k", "truthfulqa", "winogrande", "arc", "hellaswag", "mmlu/default")
    manager = TaskManager(include_defaults=False, include_path=[package.root() / "tasks" / name for name in folders])
    backend = HFLM(
        AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1
    )
    map_rows = datasets.Dataset.map

    def shuffled_alike(self: datasets.Dataset, *given: Any, **further: Any) -> datasets.Dataset:
        random.seed(0)  # GPQA's options have the order of the first seed, whatever was asked before
        return map_rows(self, *given, **further)

    found: dict[str, dict[str, Any]] = {"results": {}, "samples": {}, "n-samples": {}, "n-shot": {}}
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", made_up_rows.hub(ROWS[board]()))
        patch.setattr(datasets.Dataset, "map", shuffled_alike)
        for task, shots in ASKED[board].items():
            part = simple_evaluate(
                backend,
                tasks=[task],
                num_fewshot=shots,
                task_manager=manager,
                gen_kwargs={"max_gen_toks": NEW_TOKENS},
                bootstrap_iters=0,
            )
            for key, of_part in found.items():
                of_part |= part[key]
    return found


def columns_by_hand(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The paper's columns of the harness's numbers, with the average of the six."""
    of = found["results"]
    if "gsm8k" in of:
        columns = {
            "gsm8k": fmean(of["gsm8k"][f"exact_match,{way}"] for way in ("strict-match", "flexible-extract")),
            "truthful": of["truthfulqa_mc2"]["acc,none"],
            "winogrande": of["winogrande"]["acc,none"],
            "arc": of["arc_challenge"]["acc_norm,none"],
            "hellaswag": of["hellaswag"]["acc_norm,none"],
            "mmlu": of["mmlu"]["acc,none"],
        }
        return columns | {"average, old leaderboard": fmean(columns.values())}
    subjects = [task for task in found["samples"] if task.startswith("leaderboard_math_")]
    sizes = [found["n-samples"][task]["effective"] for task in subjects]
    columns = {
        "bbh": of["leaderboard_bbh"]["acc_norm,none"],
        "gpqa": of["leaderboard_gpqa"]["acc_norm,none"],
        "mmlu-pro": of["leaderboard_mmlu_pro"]["acc,none"],
        "musr": of["leaderboard_musr"]["acc_norm,none"],
        "ifeval": fmean(of["leaderboard_ifeval"][metric] for metric in IFEVAL),
        "math-hard": fmean([of[task]["exact_match_original,none"] for task in subjects], sizes),
    }
    return columns | {"average, new leaderboard": fmean(columns.values())}


def answers_of(samples: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """The log-probs of each question's choices, or its answer."""
    by_question = {sample["doc_id"]: [of_request[0] for of_request in sample["resps"]] for sample in samples}
    return [by_question[place] for place in sorted(by_question)]


@pytest.mark.parametrize("board", ASKED)
def test_a_whole_board(board: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each metric of each task and group is the harness's, as are the log-probs of each choice: so the prompts are."""
    monkeypatch.setattr(console, "width", 1000)
    data, out = made_up_rows.write(ROWS[board](), tmp_path / "data"), tmp_path / "out"
    result = uft_eval(model, "--suite", board, "--data", data, "--max-new-tokens", NEW_TOKENS, "--out", out)
    assert result.exit_code == 0, repr(result.exception)
    expected = harness_alone(model, board, monkeypatch)

    found = read_evaluation(out)
    ours = numbers(found)
    for task, values in expected["results"].items():
        of_task = {name: value for name, value in values.items() if "," in name and "_stderr" not in name}
        assert {name: ours[task][name] for name in of_task} == pytest.approx(of_task, abs=1e-6), task
    shots = {task.task: task.shots for task in found.tasks}
    assert {task: shots[task] for task in expected["n-shot"]} == expected["n-shot"]
    for task, samples in expected["samples"].items():
        theirs = answers_of(samples)
        lines = [json.loads(line) for line in (out / "samples" / f"{task}.jsonl").read_text().splitlines()]
        for line, answers in zip(lines, theirs, strict=True):
            for answer, other in zip(line["answers"], answers, strict=True):
                assert answer == other if isinstance(other, str) else answer[0] == pytest.approx(other[0], abs=1e-4)

    columns = columns_by_hand(expected)
    shown = result.output.partition("the paper's column")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in shown if line.startswith("|")]
    assert cells == [[name, f"{100 * value:.2f}"] for name, value in columns.items()]
    assert 0 < min(columns.values()) < max(columns.values()) < 1  # nothing is equal because it is 0 or 1
    assert "not comparable" not in result.output
    assert not found.model["cut_prompts"]
