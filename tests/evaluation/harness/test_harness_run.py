"""`uft eval` on a tiny model: the numbers of the harness's own backend, and the same ones however it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from asking import evaluated, items_of, numbers, rolling_task, stub_tasks, tiny_adapter, uft_eval
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from runs import TIMEOUT_SECONDS, forked, program, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.harness import package, tasks
from uft_ds.evaluation.harness.answered import Answers
from uft_ds.evaluation.harness.local import local_tasks
from uft_ds.evaluation.harness.suites import suite_of
from uft_ds.evaluation.results import read_evaluation
from uft_ds.export.convert import convert_to_merged
from uft_ds.export.unmerged import opened_unmerged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the harness and of what it imports


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stub_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def plain(tiny_qwen2: Path, suite: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the tiny model."""
    folder = tmp_path_factory.mktemp("evaluations") / "plain"
    evaluated(folder, tiny_qwen2, "--suite", suite)
    return folder


def harness_alone(model: Path, suite: str, **options: Any) -> dict[str, dict[str, float]]:
    """The numbers of lm-evaluation-harness with its own backend, one request at a time."""
    manager = TaskManager(include_defaults=False)
    loaded: list[Any] = []
    for part in suite.split(","):
        path, _, shots = part.partition("=")
        (task,) = manager.load([path])["tasks"].values()
        task.set_config("num_fewshot", int(shots))
        loaded.append(task)
    backend = HFLM(
        AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1
    )
    found = simple_evaluate(backend, tasks=loaded, task_manager=manager, bootstrap_iters=0, **options)
    return {
        name: {key: value for key, value in values.items() if "," in key and "stderr" not in key}
        for name, values in found["results"].items()
    }


@pytest.mark.parametrize("template", [False, True], ids=["plain", "template"])
def test_numbers_are_those_of_the_harness(tiny_qwen2: Path, suite: str, tmp_path: Path, template: bool) -> None:
    """To the last digit, although batches and the positions with logits are others."""
    options = ["--chat-template"] if template else []
    found = numbers(evaluated(tmp_path / "out", tiny_qwen2, "--suite", suite, *options))
    expected = harness_alone(tiny_qwen2, suite, apply_chat_template=template, fewshot_as_multiturn=template)
    assert found == expected
    assert 0 < found["pick"]["acc,none"] < 1


def test_items_pair_up_and_explain_the_numbers(plain: Path, tiny_qwen2: Path, suite: str, tmp_path: Path) -> None:
    """The same ids for another model of the same questions, and their mean is the task's number."""
    adapter = tiny_adapter(tiny_qwen2, tmp_path / "adapter")
    evaluated(tmp_path / "out", adapter, "--suite", suite)
    ours, theirs = items_of(plain), items_of(tmp_path / "out")
    assert ours != theirs
    for task, items in ours.items():
        assert [one.item for one in items] == [one.item for one in theirs[task]]
        metrics = numbers_of(plain)[task]
        for metric, value in metrics.items():
            assert sum(one.values[metric] for one in items) / len(items) == pytest.approx(value, abs=1e-12)


def numbers_of(folder: Path) -> dict[str, dict[str, float]]:
    return {task["task"]: task["metrics"] for task in json.loads((folder / "results.json").read_text())["tasks"]}


def test_what_was_answered_is_not_asked_again(
    plain: Path, tiny_qwen2: Path, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that ends in the middle goes on there, asks only the rest, and has the same items."""
    add, asked = Answers.add, []

    def dies(self: Answers, key: str, answers: list[Any]) -> None:
        asked.append(key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        add(self, key, answers)

    options = (tiny_qwen2, "--suite", suite, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", dies)
        assert uft_eval(*options, "--out", tmp_path / "out").exit_code == 130
    first, asked = asked[:2], []

    def counts(self: Answers, key: str, answers: list[Any]) -> None:
        asked.append(key)
        add(self, key, answers)

    monkeypatch.setattr(Answers, "add", counts)
    evaluated(tmp_path / "out", *options)
    assert asked
    assert not set(asked) & set(first)
    asked_after = len(asked)
    evaluated(tmp_path / "whole", *options)
    assert len(asked) - asked_after == asked_after + len(first)
    assert items_of(tmp_path / "out") == items_of(tmp_path / "whole") == items_of(plain)


def test_an_ended_evaluation_is_shown_again(plain: Path, tiny_qwen2: Path, suite: str) -> None:
    """Without loading a model."""
    before = (plain / "results.json").stat().st_mtime_ns
    result = uft_eval(tiny_qwen2, "--suite", suite, "--out", plain)
    assert result.exit_code == 0
    assert "complete before" in result.output
    assert (plain / "results.json").stat().st_mtime_ns == before


def test_other_settings_are_never_mixed_in(plain: Path, tiny_qwen2: Path, suite: str) -> None:
    """What differs is named, with both values."""
    result = uft_eval(tiny_qwen2, "--suite", suite, "--out", plain, "--limit", 3)
    assert result.exit_code != 0
    assert "settings.limit: nothing there, 3 now" in str(result.exception)


def test_settings_are_recorded(plain: Path) -> None:
    """All that a number depends on, with hashes of the model."""
    found = json.loads((plain / "results.json").read_text())
    settings = found["settings"]
    contents = [task.pop("content") for task in settings["tasks"].values()]
    assert [len(content) for content in contents] == [64, 64]
    assert settings["tasks"] == {
        "pick": {"shots": 1, "version": "2.0", "rows": "its task file's"},
        "say": {"shots": 0, "version": "2.0", "rows": "its task file's"},
    }
    assert (settings["chat_template"], settings["fewshot_as_multiturn"], settings["dtype"]) == (False, False, "float32")
    assert settings["versions"]["torch"] == torch.__version__
    assert len(found["model"]["base_weights"][0]) == 64
    assert found["model"]["adapter"] is None


def test_other_questions_under_the_same_name_are_other_settings(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Of a task by its file's path: neither its results nor its answers are used again."""
    suite = stub_tasks(tmp_path / "tasks").split(",")[0]
    evaluated(tmp_path / "out", tiny_qwen2, "--suite", suite)
    rows = tmp_path / "tasks" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("colour", "shade"))
    result = uft_eval(tiny_qwen2, "--suite", suite, "--out", tmp_path / "out")
    assert "settings.tasks.pick.content" in str(result.exception)


def test_texts_that_are_scored_whole(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The harness's own perplexity; such requests have no choices to show."""
    path = rolling_task(tmp_path / "tasks")
    found = numbers(evaluated(tmp_path / "out", tiny_qwen2, "--suite", f"{path}=0"))
    assert found == harness_alone(tiny_qwen2, f"{path}=0")
    first = json.loads((tmp_path / "out" / "samples" / "roll.jsonl").read_text().splitlines()[0])
    assert (first["prompt_end"], first["choices"]) == ("red and green", None)


def test_an_adapter_is_evaluated_as_its_merged_model(tiny_qwen2: Path, suite: str, tmp_path: Path) -> None:
    """Log-probs agree within the rounding of float32, so all values do."""
    adapter = tiny_adapter(tiny_qwen2, tmp_path / "adapter")
    convert_to_merged(adapter, tmp_path / "merged", say=lambda text: None)
    evaluated(tmp_path / "unmerged", adapter, "--suite", suite)
    evaluated(tmp_path / "of_merged", tmp_path / "merged", "--suite", suite)
    assert items_of(tmp_path / "unmerged") == items_of(tmp_path / "of_merged")


def test_a_padded_vocabulary_stays_whole(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Where the embedding has more rows than the tokenizer has tokens, an adapter must not cut it."""
    wide = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    wide.resize_token_embeddings(320)
    wide.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "padded")
    adapter = tiny_adapter(tmp_path / "padded", tmp_path / "adapter")
    with opened_unmerged(str(adapter), None) as found:
        model = found.load(torch.float32, torch.device("cpu"))
    assert len(found.tokenizer) == 259
    assert model.get_input_embeddings().weight.shape[0] == 320


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "gsm8k,gsm8k"], "gsm8k stands twice"),
        pytest.param(["--suite", "gsm9k"], "no task 'gsm9k'; did you mean gsm8k", marks=pytest.mark.long),
        (["--suite", "quick", "--data", "/nowhere"], "--data: /nowhere: no such folder"),
        (["--suite", "quick", "--multiturn"], "add --chat-template"),
        (["--suite", "gsm8k", "--base", "x"], "leave --base out"),
        (["--suite", "/no/task.yaml"], "--suite: /no/task.yaml: no such file; expected a task file"),
        (["--suite", "gsm8k"], "gsm8k: its rows are not in the hub's cache, and HF_HUB_OFFLINE forbids"),
    ],
)
def test_bad_input_is_named(tiny_qwen2: Path, arguments: list[str], words: str, tmp_path: Path) -> None:
    """Before a folder is made."""
    result = uft_eval(tiny_qwen2, *arguments, "--out", tmp_path / "out")
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_a_folder_of_rows_lacks_is_named(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A folder with the rows of another task of the suite is no folder without rows: the files that it lacks."""
    data = tmp_path / "data"
    (data / "truthfulqa").mkdir(parents=True)
    targets = {"choices": ["a", "b"], "labels": [1, 0]}
    row = {"question": "q", "mc1_targets": targets, "mc2_targets": targets}
    (data / "truthfulqa/multiple_choice.jsonl").write_text(json.dumps(row) + "\n")
    result = uft_eval(tiny_qwen2, "--suite", "truthfulqa_mc1=0,gsm8k", "--data", data, "--out", tmp_path / "out")
    first, second = str(result.exception).splitlines()
    files = "gsm8k/train.jsonl, gsm8k/test.jsonl"
    assert first == f"gsm8k: its rows are not in --data {data}: looked for {files}, of which none is there"
    assert second.startswith("gsm8k: its rows are not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch them (")
    assert second.endswith("); put the files there, or run it once with a network")
    assert not (tmp_path / "out").exists()


def test_a_task_file_that_cannot_be_asked_is_named(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Broken YAML, rows that are none, and fewer examples than are asked for; the hub has nothing to do with it."""
    pick = stub_tasks(tmp_path / "tasks").split(",")[0].partition("=")[0]
    options = ("--out", tmp_path / "out")
    few = uft_eval(tiny_qwen2, "--suite", f"{pick}=9", *options)
    assert "pick: 9 examples in each prompt, but there are rows for 7; ask for fewer with pick=7" in str(few.exception)
    (tmp_path / "tasks" / "rows.jsonl").write_text("{oops\n")
    rows = uft_eval(tiny_qwen2, "--suite", pick, *options)
    assert f"--suite: {pick}: the task, or its rows, cannot be read (" in str(rows.exception)
    Path(pick).write_text("task: [x\n")
    broken = uft_eval(tiny_qwen2, "--suite", pick, *options)
    assert f"--suite: {pick}: the task, or its rows, cannot be read (while parsing" in str(broken.exception)
    assert all(isinstance(one.exception, UserError) for one in (few, rows, broken))
    assert not (tmp_path / "out").exists()


def test_a_seed_that_numpy_cannot_take_is_refused(tiny_qwen2: Path) -> None:
    """By the option, with the largest that it can."""
    result = uft_eval(tiny_qwen2, "--suite", "quick", "--seed", 2**32)
    assert result.exit_code == 2
    assert "4294967295" in result.output


def test_an_environment_without_the_harness_is_told_what_to_install(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(package, "NAME", "no_such_package")
    assert "the extra uft_ds[eval] brings it: pip install" in str(uft_eval(tiny_qwen2, "--suite", "quick").exception)


def test_a_lost_hub_is_no_fault_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3: the same command may succeed later."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def load() -> None:
        raise ValueError("dataset") from ConnectionError("no route")

    with pytest.raises(CheckFailed, match="gsm8k: the hub cannot be reached"):
        tasks.explained("gsm8k", load)


@pytest.mark.long
def test_tasks_from_files_have_the_numbers_of_the_harness(tiny_qwen2: Path, test_data: Path, tmp_path: Path) -> None:
    """Rows of five tasks; prompts that do not fit into 512 positions lose their beginning, as the harness cuts them."""
    data, files = tmp_path / "data", tmp_path / "files"
    for name, there in (
        ("ifeval", "ifeval"), ("gsm8k", "gsm8k"), ("truthfulqa", "truthfulqa"),
        ("arc_challenge/train.jsonl", "arc/hf_train.jsonl"), ("arc_challenge/test.jsonl", "arc/hf_validation.jsonl"),
    ):  # fmt: skip
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).symlink_to(test_data / there)
    suite = "ifeval=0,gsm8k=2,truthfulqa_mc1=0,truthfulqa_mc2=0,arc_challenge=2"
    options = ("--data", data, "--limit", 3, "--max-new-tokens", 8)
    found = evaluated(tmp_path / "out", tiny_qwen2, "--suite", suite, *options)
    assert found.model["cut_prompts"]["truthfulqa_mc1"] > 0
    files.mkdir()
    for task in local_tasks(data, suite_of(suite).asked):
        task.write(files)
        tree = yaml.safe_load((files / f"{task.name}.yaml").read_text())
        if task.name in ("ifeval", "gsm8k"):
            of_task = {"until": [], "do_sample": False, "temperature": 0.0}
            if task.name == "gsm8k":
                of_task["until"] = ["Question:", "</s>", "<|im_end|>"]
            tree["generation_kwargs"] = of_task | {"max_gen_toks": 8}
        (files / f"{task.name}.yaml").write_text(yaml.safe_dump(tree))
    paths = ",".join(
        f"{files / name}.yaml={shots}" for name, _, shots in (part.partition("=") for part in suite.split(","))
    )
    expected = harness_alone(tiny_qwen2, paths, limit=3)
    assert {task: values for task, values in numbers(found).items() if task in expected} == expected


@pytest.mark.long
def test_a_run_is_evaluated_in_its_folder(tiny_qwen2: Path, suite: str, tmp_path: Path) -> None:
    """The newest checkpoint on its base, by the run's own template: the values of the merged model."""
    trained = forked("uft_ds", "train", str(write_recipe(tmp_path, tiny_qwen2)))
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "run"
    result = uft_eval(run, "--suite", suite, "--chat-template")
    assert result.exit_code == 0, repr(result.exception)
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name == "pick+say-step4-chat"
    found = read_evaluation(folder)
    assert (found.name, found.model["step"]) == ("run step 4", 4)
    assert f"results: {folder}" in result.output.replace("\n", "")
    convert_to_merged(run, tmp_path / "merged", say=lambda text: None)
    merged = evaluated(tmp_path / "of_merged", tmp_path / "merged", "--suite", suite, "--chat-template")
    assert items_of(folder) == items_of(tmp_path / "of_merged")
    assert merged.model["tokenizer"] == found.model["tokenizer"]


@pytest.mark.long
def test_two_ranks_have_the_numbers_of_one(plain: Path, tiny_qwen2: Path, suite: str, tmp_path: Path) -> None:
    """Started by a launcher, they share nothing but the folder; each writes a part of the answers."""
    command = ("eval", str(tiny_qwen2), "--suite", suite, "--batch-size", "2", "--out", str(tmp_path / "out"))
    ranks = [program("uft_ds", *command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    for rank in ranks:
        said = rank.communicate(timeout=TIMEOUT_SECONDS)
        assert rank.returncode == 0, said
    assert items_of(tmp_path / "out") == items_of(plain)
    for rank in (0, 1):
        (path,) = (tmp_path / "out" / "answers").glob(f"*/rank-{rank}.jsonl")
        assert len(path.read_text().splitlines()) > 3


@pytest.mark.long
def test_a_process_that_is_lost_ends_the_evaluation(tiny_qwen2: Path, suite: str, tmp_path: Path) -> None:
    """With exit code 3 and its last line; afterwards one process answers what is left, and the numbers are whole."""
    out = tmp_path / "out"
    command = ("eval", str(tiny_qwen2), "--suite", suite, "--batch-size", "1", "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "-m", "uft_ds", *command, "--processes", "2"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (children := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    children[0].kill()
    errors = process.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert process.returncode == 3, errors
    assert "process 1 of 2 has ended with exit code -9" in errors
    before = sum(len(path.read_text().splitlines()) for path in out.rglob("rank-*.jsonl"))
    assert before > 3
    assert numbers(evaluated(out, *command[1:-2])) == numbers(evaluated(tmp_path / "one", *command[1:-2]))
