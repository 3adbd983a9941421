"""A task before it is asked: the hash of all that it asks, rows that are shuffled once, and its limit of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import needs
import pytest
import yaml

from uft_ds.evaluation.harness.suites import suite_of
from uft_ds.evaluation.harness.tasks import Loaded, Options, loaded_tasks

needs.installed("lm_eval", "pip install '.[eval]' brings it")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the harness and of what it imports

SHUFFLED = """\
import random


def with_answers(rows):
    def one(row):
        words = ["a", "b", "c", "d", "e"]
        random.shuffle(words)
        return {"words": words, "right": words.index("c")}

    return rows.map(one)


def asked(row):
    return "Q: " + row["question"]
"""


def task_in(folder: Path, *, rows: int = 8, **changes: Any) -> Path:
    """A task file with a function beside it, which shuffles the choices by Python's own generator as GPQA's does."""
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"question": f"q{number}"}) + "\n" for number in range(rows))
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "words.py").write_text(SHUFFLED)
    tree = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{words}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    } | changes
    text = yaml.safe_dump(tree) + "process_docs: !function words.with_answers\ndoc_to_text: !function words.asked\n"
    (folder / "choose.yaml").write_text(text)
    return folder / "choose.yaml"


@contextmanager
def loaded(suite: str, *, seed: int = 0, max_new_tokens: int | None = None) -> Iterator[Loaded]:
    options = Options(None, False, False, (seed, 1, 1, 1), "float32", max_new_tokens)
    with loaded_tasks(suite_of(suite), None, options) as found:
        yield found


def content(path: Path, shots: int = 0) -> str:
    with loaded(f"{path}={shots}") as found:
        return found.content["choose"]


def test_the_hash_is_that_of_what_is_asked(tmp_path: Path) -> None:
    """Another question, another word of the prompt, or another line of a function; not another place."""
    first = content(task_in(tmp_path / "a"))
    assert content(task_in(tmp_path / "b")) == first
    others = [content(task_in(tmp_path / "b", rows=9)), content(task_in(tmp_path / "b", description="Choose."))]
    path = task_in(tmp_path / "b")
    words = tmp_path / "b" / "words.py"
    words.write_text(SHUFFLED.replace("Q: ", "Question: "))
    others.append(content(path))
    words.write_text(f"{SHUFFLED}\n\nUNUSED = 1\n")  # another function may read it
    others.append(content(path))
    task_in(tmp_path / "b").rename(tmp_path / "b" / "inner.yaml")
    path.write_text("include: inner.yaml\ntask: choose\n")
    before = content(path)
    (tmp_path / "b" / "inner.yaml").open("a").write("repeats: 1\n")
    others += [before, content(path)]
    assert len({first, *others}) == 1 + len(others)


def test_rows_of_examples_count_where_there_are_examples(tmp_path: Path) -> None:
    """With no examples in a prompt, other rows for them change nothing."""
    found: dict[tuple[int, int], str] = {}
    for number in (2, 3):
        examples = tmp_path / "examples.jsonl"
        examples.write_text("".join(json.dumps({"question": f"e{place}"}) + "\n" for place in range(number)))
        files = {"test": str(tmp_path / "a" / "rows.jsonl"), "train": str(examples)}
        path = task_in(tmp_path / "a", dataset_kwargs={"data_files": files}, fewshot_split="train")
        found |= {(number, shots): content(path, shots) for shots in (0, 1)}
    assert found[2, 0] == found[3, 0]
    assert found[2, 1] != found[3, 1]


def orders(found: Loaded) -> list[list[str]]:
    """The choices of each question, looked at as often as the harness does: for its requests and for its grades."""
    task = found.as_asked["tasks"]["choose"]
    looks = [[list(row["words"]) for row in task.eval_docs] for _ in range(3)]
    assert looks[0] == looks[1] == looks[2]
    return looks[0]


def test_options_are_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    """The same ones whenever they are looked at, beside any task, and not those that another seed has left on disk."""
    path = task_in(tmp_path / "a")
    other = tmp_path / "other"
    other.mkdir()
    text = task_in(other).read_text().replace("task: choose", "task: another")
    (other / "choose.yaml").write_text(text)
    found = {}
    for seed in (0, 7, 0):
        with loaded(str(path), seed=seed) as alone:
            assert found.setdefault(seed, orders(alone)) == orders(alone)
    assert found[0] != found[7]
    assert len({tuple(words) for words in found[0]}) > 1
    with loaded(f"{other / 'choose.yaml'},{path}") as both:
        assert orders(both) == found[0]


@pytest.mark.parametrize(
    ("own", "most", "expected"),
    [
        ({}, 1000, 256),  # the harness's own limit where a task says none
        ({"max_new_tokens": 64}, 1000, 64),
        ({"max_gen_toks": 1280, "max_tokens": 9}, 32, 32),
        ({"max_gen_toks": 8}, 32, 8),
    ],
)
def test_a_limit_of_tokens_is_never_raised(own: Mapping[str, int], most: int, expected: int, tmp_path: Path) -> None:
    """By whichever of the harness's names the task says its own; the others go, as the harness would read one alone."""
    answers = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{words[0]}}"}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    settings = {"generation_kwargs": {"until": ["\n"], **own}, "metric_list": metrics}
    path = task_in(tmp_path / "a", **answers, **settings)
    with loaded(str(path), max_new_tokens=most) as found:
        kwargs = found.as_asked["tasks"]["choose"].get_config("generation_kwargs")
    limits = {key: value for key, value in kwargs.items() if key.startswith("max_")}
    assert limits == {"max_gen_toks": expected}
