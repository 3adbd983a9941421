"""`uft generate`: the answers are the model's own, whatever was interrupted, and settings are never mixed."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import TIMEOUT_SECONDS, program, uft, write_rows
from transformers import AutoModelForCausalLM

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.benchmarks import answering
from uft_ds.evaluation.benchmarks.answering import answered, batches_of, seed_of
from uft_ds.evaluation.benchmarks.make import GenerationInputs, Made, make_answers
from uft_ds.evaluation.benchmarks.work import Work
from uft_ds.evaluation.generate import prompt_ids, stop_token_ids
from uft_ds.evaluation.models import Subject, open_subject

CATEGORIES = ["writing", "math", "stem", "other", "math", "coding", "writing"]
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81 + n, "category": category, "turns": [f"Say {n} {'very ' * n}well.", f"Again, {n}."]}
    for n, category in enumerate(CATEGORIES)
]


@pytest.fixture(scope="module")
def subject(tiny_qwen2: Path) -> Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return open_subject(str(tiny_qwen2))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "q.jsonl", QUESTIONS)


def asked(questions: Path, **changes: Any) -> GenerationInputs:
    return GenerationInputs("mt_bench", questions, **{"max_new_tokens": 12, "batch_size": 3, **changes})


def made(subject: Subject, how: GenerationInputs, out: Path, **options: Any) -> Made:
    return make_answers(how, how.read(), subject, out, name="tiny", **options)


def answers_in(path: Path) -> dict[int, list[str]]:
    return {line["question_id"]: line["choices"][0]["turns"] for line in map(json.loads, path.read_text().splitlines())}


def plain_answer(subject: Subject, messages: list[dict[str, str]], count: int) -> str:
    """The obvious loop: one row, no padding, no cache."""
    ids, stop = prompt_ids(subject.chat.tokenizer, messages), stop_token_ids(subject.model, subject.chat.tokenizer)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(subject.model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in stop:
                break
            new.append(token)
    return str(subject.chat.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_the_second_turn_is_asked_after_the_first_answer(subject: Subject, questions: Path, tmp_path: Path) -> None:
    """Each answer equals the one of a plain loop over the conversation so far, in the order of the questions."""
    made(subject, asked(questions, temperature=0.0), tmp_path / "a.jsonl")
    found = answers_in(tmp_path / "a.jsonl")
    assert list(found) == [question["question_id"] for question in QUESTIONS]
    for question in QUESTIONS:
        messages: list[dict[str, str]] = []
        for turn, said in zip(question["turns"], found[question["question_id"]], strict=True):
            messages.append({"role": "user", "content": turn})
            assert said == plain_answer(subject, messages, 12)
            messages.append({"role": "assistant", "content": said})
    assert len({tuple(turns) for turns in found.values()}) > 3


def test_temperatures_are_those_of_the_category(
    subject: Subject, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastChat's, 0.7 for a category that it does not know; or the one that is given. Recorded beside the output."""
    seen: dict[float, set[str]] = {}
    real = answering._batch_answered

    def spied(subject: Subject, batch: Any, how: Any, seed: int, **options: Any) -> Any:
        seen.setdefault(how.temperature, set()).update(question.category for question in batch)
        return real(subject, batch, how, seed, **options)

    monkeypatch.setattr(answering, "_batch_answered", spied)
    made(subject, asked(questions), tmp_path / "a.jsonl")
    assert seen == {0.7: {"writing", "other"}, 0.1: {"stem"}, 0.0: {"math", "coding"}}
    recorded = json.loads((tmp_path / "a.jsonl.settings.json").read_text())["temperature"]
    assert recorded == {"writing": 0.7, "math": 0.0, "stem": 0.1, "other": 0.7, "coding": 0.0}
    seen.clear()
    made(subject, asked(questions, temperature=0.5), tmp_path / "b.jsonl")
    assert list(seen) == [0.5]


@pytest.mark.parametrize("batches_before", [1, 2])
def test_an_interrupted_generation_goes_on_to_the_same_bytes(
    subject: Subject, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches_before: int
) -> None:
    """With drawn answers, and a last line that was cut off; no batch that was kept is asked again."""
    monkeypatch.setattr(time, "time", lambda: 7.0)
    how = asked(questions)
    made(subject, how, tmp_path / "whole.jsonl")
    out = tmp_path / "cut.jsonl"
    real, count = Work.add, 0

    def cut(self: Work, batch: Any) -> None:
        nonlocal count
        if count == batches_before:
            raise KeyboardInterrupt
        count += 1
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "add", cut)
        with pytest.raises(KeyboardInterrupt):
            made(subject, how, out)
    assert not out.exists()
    partial = tmp_path / "cut.jsonl.partial.jsonl"
    with partial.open("ab") as file:
        file.write(b'[{"key": 81, "turns": ["ha')
    ended = made(subject, how, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    batches = [len(batch) for _, batch in batches_of(subject, how.read(), how.plan)]
    assert ended.new == sum(batches[batches_before:])
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.jsonl", "cut.jsonl.settings.json"]


def test_a_complete_output_is_left_as_it_is(subject: Subject, questions: Path, tmp_path: Path) -> None:
    """Its lengths are told again; one that was changed since is refused."""
    out = tmp_path / "a.jsonl"
    first = made(subject, asked(questions), out)
    before = out.stat().st_mtime_ns
    again = made(subject, asked(questions), out)
    assert (again.was_complete, again.new, again.lengths) == (True, 0, first.lengths)
    assert out.stat().st_mtime_ns == before
    out.write_text(out.read_text() + "\n")
    with pytest.raises(UserError, match="has been changed since it was written"):
        made(subject, asked(questions), out)


def test_other_settings_are_refused_by_name(subject: Subject, questions: Path, tmp_path: Path) -> None:
    """Nothing is changed; `overwrite` begins anew."""
    out = tmp_path / "a.jsonl"
    made(subject, asked(questions), out)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"max_new_tokens": 13}, "max_new_tokens: 12 there, 13 now"),
        ({"temperature": 0.5}, "temperature.all: nothing there, 0.5 now"),
        ({"batch_size": 4}, "batch_size: 3 there, 4 now"),
        ({"limit": 2}, "questions.count: 7 there, 2 now"),
    ]
    for change, said in changes:
        with pytest.raises(UserError) as error:
            made(subject, asked(questions, **change), out)
        assert said in str(error.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert made(subject, asked(questions, limit=2), out, overwrite=True).new == 2


def test_other_questions_another_model_or_other_versions_are_refused(
    subject: Subject, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of before and after an upgrade would be one file."""
    out = tmp_path / "a.jsonl"
    made(subject, asked(questions), out)
    other = write_rows(tmp_path / "other.jsonl", QUESTIONS[::-1])
    with pytest.raises(UserError, match=r"questions\.sha256"):
        made(subject, asked(other), out)
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} of tomorrow")
    with pytest.raises(UserError, match=r"versions\.torch: .* there, \"torch of tomorrow\" now"):
        made(subject, asked(questions), out)
    monkeypatch.undo()
    changed = Subject(subject.model, subject.chat, subject.name, {**subject.identity, "base_weights": ["0"]})
    with pytest.raises(UserError, match=r"model\.base_weights"):
        made(changed, asked(questions), out)
    (tmp_path / "foreign.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"exists, without foreign\.jsonl\.settings\.json"):
        made(subject, asked(questions), tmp_path / "foreign.jsonl")
    with pytest.raises(UserError, match="is the file of questions"):
        made(subject, asked(questions), questions)


def test_lengths_count_what_is_unfinished_and_empty(
    subject: Subject, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: of 14 answers those that ended before the 12th token; an end at once is an empty answer."""
    found = made(subject, asked(questions, temperature=0.0), tmp_path / "a.jsonl").lengths
    texts = [text for turns in answers_in(tmp_path / "a.jsonl").values() for text in turns]
    assert found.answers == 14
    assert found.mean_characters == pytest.approx(sum(map(len, texts)) / 14)
    assert (found.characters[0], found.characters[-1]) == (min(map(len, texts)), max(map(len, texts)))
    assert found.unfinished == 1.0  # a random model ends nothing by itself in 12 tokens
    assert found.mean_tokens == 12
    assert found.empty == 0
    monkeypatch.setattr(answering, "stop_token_ids", lambda model, tokenizer: list(range(259)))
    ended = made(subject, asked(questions, temperature=0.0), tmp_path / "b.jsonl").lengths
    assert (ended.unfinished, ended.empty, ended.mean_tokens) == (0.0, 1.0, 0.0)


def test_draws_depend_on_the_seed_and_the_question_alone(subject: Subject, questions: Path, tmp_path: Path) -> None:
    """The same questions beside others, in other batches, get the same draws."""
    how = asked(questions, temperature=1.0)
    made(subject, how, tmp_path / "a.jsonl")
    made(subject, asked(questions, temperature=1.0, batch_size=1, limit=3), tmp_path / "b.jsonl")
    made(subject, asked(questions, temperature=1.0, seed=1), tmp_path / "c.jsonl")
    a, b, c = (answers_in(tmp_path / f"{name}.jsonl") for name in "abc")
    assert [a[key] for key in b] == list(b.values())
    assert a != c
    seeds = {seed_of(seed, key, turn) for seed in range(3) for key in range(50) for turn in range(2)}
    assert len(seeds) == 300
    assert max(seeds) < 2**63


def test_a_question_that_leaves_no_room_is_named(subject: Subject, questions: Path, tmp_path: Path) -> None:
    """Before anything is generated, with the limit that would do; nothing is left behind."""
    with pytest.raises(UserError) as error:
        made(subject, asked(questions, max_new_tokens=300), tmp_path / "a.jsonl")
    assert f"{questions}:1: " in str(error.value)
    least = int(str(error.value).rpartition(" ")[2])
    assert 100 < least < 300
    assert list(tmp_path.glob("a*")) == []


def test_logits_that_are_no_numbers_end_it(subject: Subject, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = asked(questions)
    read = how.read()
    batches = batches_of(subject, read, how.plan)
    weight = subject.model.lm_head.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight.data, float("nan")))
    with pytest.raises(CheckFailed, match="not finite"):
        list(answered(subject, batches, how.plan))


def test_an_adapter_answers_as_peft_does(tiny_qwen2: Path, questions: Path, tmp_path: Path) -> None:
    """Not as its base; the identity names it, and another base is refused for a whole model."""
    torch.manual_seed(0)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    policy.save_pretrained(str(tmp_path / "adapter"))
    tuned = open_subject(str(tmp_path / "adapter"), base=str(tiny_qwen2))
    plain = open_subject(str(tiny_qwen2))
    assert tuned.name == "adapter"
    assert "adapter" in tuned.identity
    assert tuned.identity["base_weights"] == plain.identity["base_weights"]
    how = asked(questions, temperature=0.0, limit=2)
    made(tuned, how, tmp_path / "a.jsonl")
    found = answers_in(tmp_path / "a.jsonl")
    by_peft = Subject(policy.eval(), tuned.chat, "", {})
    for question in QUESTIONS[:2]:
        messages = [{"role": "user", "content": question["turns"][0]}]
        assert found[question["question_id"]][0] == plain_answer(by_peft, messages, 12)
        assert found[question["question_id"]][0] != plain_answer(plain, messages, 12)
    with pytest.raises(UserError, match=r"--base: .* is a whole model, which has no other base"):
        open_subject(str(tiny_qwen2), base="elsewhere")


@pytest.mark.long
def test_the_command_killed_in_the_middle_goes_on(subject: Subject, tiny_qwen2: Path, tmp_path: Path) -> None:
    """As a user runs it, for AlpacaEval: SIGKILL, then the same command; the file is as if nothing had been."""
    entries = [{"instruction": f"Say {n}", "dataset": "koala", "output": "x", "generator": "ref"} for n in range(10)]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    words = [
        *("generate", str(tiny_qwen2), "--benchmark", "alpaca_eval", "--questions", str(tmp_path / "q.json")),
        *("--out", str(tmp_path / "cut.json"), "--max-new-tokens", "64", "--batch-size", "1", "--temperature", "1"),
    ]
    process = program("uft_ds", *words)
    partial = tmp_path / "cut.json.partial.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not partial.exists() or len(partial.read_bytes().splitlines()) < 2:
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill_group()
    kept = len(partial.read_bytes().splitlines())
    assert 2 <= kept < 10
    ended = uft(*words)
    assert ended.returncode == 0, ended.stderr
    assert f"{kept} questions had been answered before" in ended.stdout
    assert "unfinished" in ended.stdout
    how = GenerationInputs("alpaca_eval", tmp_path / "q.json", 1.0, max_new_tokens=64, batch_size=1)
    make_answers(how, how.read(), subject, tmp_path / "whole.json", name=tiny_qwen2.name)
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    found = json.loads((tmp_path / "cut.json").read_text())
    assert [entry["instruction"] for entry in found] == [entry["instruction"] for entry in entries]
    assert {(entry["generator"], entry["dataset"]) for entry in found} == {(tiny_qwen2.name, "koala")}


@pytest.mark.long
def test_a_real_model_answers_published_questions(test_data: Path, tmp_path: Path) -> None:
    """The quickstart's model on MT-Bench's first question: its own words, as a plain loop has them, both turns."""
    model = open_subject(str(needs.smollm2()))
    how = GenerationInputs("mt_bench", test_data / "mt_bench" / "question.jsonl", 0.0, max_new_tokens=8, limit=1)
    lengths = made(model, how, tmp_path / "a.jsonl").lengths
    assert lengths.empty == 0
    for question in how.read():
        messages: list[dict[str, str]] = []
        for turn, said in zip(question.turns, answers_in(tmp_path / "a.jsonl")[question.key], strict=True):
            messages.append({"role": "user", "content": turn})
            assert said == plain_answer(model, messages, 8)
            messages.append({"role": "assistant", "content": said})
