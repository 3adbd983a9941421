#!/usr/bin/env bash
# lm-eval 0.4.13, datasets 5.2.0: GPQA asks its options in the order of an earlier run's seed, and reports the new seed.
#
# `process_docs` of the GPQA tasks (zero-shot, chain of thought, generative, leaderboard) shuffles each question's options by
# Python's global `random` inside `dataset.map`. `datasets` keeps the map's result on disk under a fingerprint of the data and
# the function; the state of `random` is no part of it. So a task's first run settles the order for all later runs with that
# cache: seed 7 after seed 0 asks what seed 0 asked, and its results say `random_seed` 7 all the same. Two machines with equal
# settings ask different questions if one of them has run the task with another seed before. Nothing is said.
#
# An empty HF_DATASETS_CACHE for each run makes the seed count. `datasets.disable_caching()` is no way out: the harness calls
# `process_docs` for the prompts and again for the scores, and without a cache each call shuffles anew: the scores take another
# letter for the right one than the prompt does.
#
# Seen: 40 invented questions through the harness's own task, each run in its own process. Seed 7 after seed 0 in one cache:
# 40 have the options in seed 0's order. Seed 7 with an empty cache: 3 have, and all 40 are as with another empty cache. The
# letter that is scored as right stands before the right answer in 40 of 40 prompts, with caching disabled in 6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm-eval==0.4.13 datasets==5.2.0 2>/dev/null

# One run of the harness: GPQA's own task file, with invented questions for its data.
cat >"$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

folder, seed, caching = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if caching == "off":
    datasets.disable_caching()
gpqa = Path(lm_eval.__file__).parent / "tasks/gpqa/zeroshot/gpqa_main_zeroshot.yaml"
(folder / "task").mkdir(exist_ok=True)
local = {"include": str(gpqa), "task": "gpqa_local", "dataset_path": "json", "dataset_name": None}
local["dataset_kwargs"] = {"data_files": {"train": str(folder / "questions.jsonl")}}
(folder / "task/gpqa_local.yaml").write_text(json.dumps(local))

tasks = TaskManager(include_path=str(folder / "task"), include_defaults=False)
found = lm_eval.simple_evaluate(
    "dummy", tasks=["gpqa_local"], task_manager=tasks, random_seed=seed, log_samples=True, bootstrap_iters=0
)
samples = found["samples"]["gpqa_local"]
asked = [sample["arguments"][0][0] for sample in samples]
# Does the letter that is scored as right stand before the right answer in the prompt?
right = [
    f"{sample['target']} {sample['doc']['Correct Answer']}\n" in prompt
    for sample, prompt in zip(samples, asked, strict=True)
]
print(json.dumps({"seed": found["config"]["random_seed"], "asked": asked, "right": right}))
PYTHON

cat >"$folder/options.py" <<'PYTHON'
import json
import os
import subprocess
import sys
from pathlib import Path

QUESTIONS = 40
folder = Path(sys.argv[1])
columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
questions = [
    {"Question": f"{number} + {number} = ?"}
    | {column: f"the number {2 * number + wrong}" for wrong, column in enumerate(columns)}
    for number in range(QUESTIONS)
]
(folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def run(cache, seed, caching="on"):
    """What a process of its own asks and scores, with its data sets in the cache of that name."""
    folders = {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(folder / "run.py"), str(folder), str(seed), caching]
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seed"] == seed, "the results name the seed that was asked for"
    assert len(found["asked"]) == QUESTIONS, len(found["asked"])
    return found


def same(one, other):
    """How many questions have the options in the same order in both runs."""
    return sum(a == b for a, b in zip(one["asked"], other["asked"], strict=True))


first, later = run("old", 0), run("old", 7)
alone, again = run("new", 7), run("newer", 7)
uncached = run("newest", 7, caching="off")
print(f"seed 7 after seed 0, one cache: {same(first, later)} of {QUESTIONS} questions as seed 0 asked them")
print(f"seed 7, empty cache: {same(first, alone)} of {QUESTIONS}; {same(alone, again)} as with another empty cache")
print(f"first question, seed 7 after seed 0: {later['asked'][0].splitlines()[2:6]}")
print(f"first question, seed 7, empty cache: {alone['asked'][0].splitlines()[2:6]}")
print(
    f"the scored letter stands before the right answer: {sum(alone['right'])} of {QUESTIONS}; "
    f"caching disabled: {sum(uncached['right'])}"
)
assert same(first, later) == QUESTIONS, "the old order, whatever the seed"
assert same(first, alone) < QUESTIONS // 4, "the seed counts where the cache is empty"
assert same(alone, again) == QUESTIONS, "and it alone"
assert all(first["right"] + later["right"] + alone["right"]), "with a cache, scored as asked"
assert sum(uncached["right"]) < QUESTIONS // 2, "without one, not"
PYTHON
"$folder/venv/bin/python" "$folder/options.py" "$folder"
