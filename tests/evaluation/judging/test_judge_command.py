"""`uft judge`: what is refused, how a judgement goes on, and how two are compared; the judge is an HTTP server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from judged import PROMPTS, QUESTIONS, Uft, as_told, by_quality, graded, write_answers, write_outputs
from judges import Asked, Fault, judge
from runs import write_rows
from suites import long_but


def test_too_many_failures_write_no_results(uft: Uft) -> None:
    """Exit code 1; the same command asks again for what is missing, and only for that."""

    def answer(asked: Asked) -> str | Fault:
        return Fault(400) if graded(asked) == "grade 4" else as_told(asked)

    with judge(answer) as at:
        code, out, _ = uft.mt_bench(at)
        assert code == 1
        assert "12.5% of the judgements are missing, at most 10.0% may" in out
        assert not (uft.folder / "out" / "results.json").exists()
        before = len(at.asked)
        at.answer = as_told
        assert uft.mt_bench(at)[0] == 0
        assert len(at.asked) == before + 1
        code, out, _ = uft.mt_bench(at)
        assert (code, len(at.asked)) == (0, before + 1)
        assert "nothing to do" in out


def test_an_interrupted_judgement_asks_for_nothing_twice(uft: Uft) -> None:
    """A limit on tokens ends it with 3; without the limit the same command goes on, and what was spent is summed."""
    with judge(as_told) as at:
        code, _, err = uft.mt_bench(at, "--max-tokens-spent", "2800", "--concurrency", "1")
        assert code == 3
        assert "--max-tokens-spent" in err
        assert "goes on where this one stopped" in err
        first = len(at.asked)
        assert 0 < first < 8
        code, out, _ = uft.mt_bench(at, "--price", "1,2")
        assert (code, len(at.asked)) == (0, 8)
    assert "tokens: 800 of prompts, 80 of replies" in out
    assert f"cost {(800 + 160) / 1e6:.4f}" in out


@pytest.mark.parametrize("benchmark", long_but(["mt_bench"], ["mt_bench", "alpaca_eval"]))
def test_a_judgement_that_was_killed_goes_on_to_the_same_table(uft: Uft, benchmark: str) -> None:
    """SIGKILL when half of 40 judgements are made: the same command asks for the rest alone."""
    numbers = range(20)
    write_rows(uft.folder / "q.jsonl", [QUESTIONS[0] | {"question_id": 81 + n} for n in numbers])
    write_answers(uft.folder / "a.jsonl", [[f"grade {1 + n % 9} of {n}", f"grade {1 + n % 7} of {n}"] for n in numbers])
    write_outputs(uft.folder / "a.json", [f"q {n % 5} of {n}" for n in numbers], "m")
    write_outputs(uft.folder / "r.json", [f"r {n % 3} of {n}" for n in numbers], "ref")
    answer = as_told if benchmark == "mt_bench" else by_quality
    half, is_dead = threading.Event(), threading.Event()

    def halts(asked: Asked) -> str:
        if asked.number >= 20:
            half.set()
            is_dead.wait(60)
        return answer(asked)

    def told(*further: object) -> tuple[int, list[str], list[dict[str, Any]]]:
        """The exit code, the table, and the judgements without the words of the judge."""
        code, out, err = uft(*uft.words(benchmark, at), *further)
        assert code == 0, err
        results = Path(str(further[1])) if further else uft.folder / "out"
        lines = (results / "judgements.jsonl").read_text().splitlines()
        judgements = [{**json.loads(line), "reply": None} for line in lines]
        return code, [line for line in out.splitlines() if line.split()[:2] == ["m", benchmark]], judgements

    with judge(answer) as at:
        expected = told("--out", uft.folder / "whole", "--cache", uft.folder / "cache_of_whole")
        assert len(at.asked) == 40
        at.asked.clear()
        at.answer = halts
        command = [sys.executable, "-m", "uft_ds", *uft.words(benchmark, at), "--concurrency", "2"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            assert half.wait(60)
        finally:
            process.kill()
            process.wait(60)
            is_dead.set()
        assert not (uft.folder / "out" / "results.json").exists()
        assert told() == expected
        questions = [re.sub("[0-9a-f]{24}", "", asked.question) for asked in at.asked]  # without the name of a request
    assert len(expected[1]) > 2
    assert len(set(questions)) == 40
    assert len(questions) <= 42  # those under way at the kill were not answered


def test_a_dry_run_asks_and_writes_nothing(uft: Uft) -> None:
    with judge(as_told) as at:
        code, out, _ = uft.mt_bench(at, "--dry-run", "--price", "1,2", "--limit", "2")
        assert (code, at.asked) == (0, [])
    assert "4 questions to the judge, 0 of them answered by kept replies" in out
    assert "at most about 0.0" in out
    assert "First 0?" in out
    assert "uft_ds's rubric" in out
    assert not (uft.folder / "out").exists()


def test_another_judgement_is_refused_by_name(uft: Uft) -> None:
    """Other answers, references, prompts or another judge never share a folder's numbers; nothing is asked."""
    with judge(as_told) as at:
        assert uft.mt_bench(at)[0] == 0
        at.asked.clear()
        before = (uft.folder / "out" / "results.json").read_bytes()
        for further, said in (
            (["--references", uft.folder / "ref.jsonl"], "references: nothing there"),
            (["--prompts", uft.folder / "p.jsonl"], "prompts: "),
            (["--judge-body", '{"temperature": 1}'], "judge.temperature: 0 there, 1 now"),
            (["--limit", "3"], "questions.count: 4 there, 3 now"),
        ):
            code, _, err = uft.mt_bench(at, *further)
            assert (code, said in err, at.asked) == (2, True, []), err
        write_answers(uft.folder / "b.jsonl", [["grade 1", "grade 1"]] * 4)
        assert "answers.sha256" in uft.mt_bench(at, answers="b.jsonl")[2]
    assert (uft.folder / "out" / "results.json").read_bytes() == before
    (uft.folder / "out" / "settings.json").unlink()
    assert "is not empty" in uft.mt_bench(at)[2]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--against", "x.json"], "--against: of no use with --benchmark mt_bench"),
        (["--references", "few.jsonl"], "question 83, coding, has no reference in"),
        (["--prompts", "few.jsonl"], "lacks single-v1; expected FastChat's judge_prompts.jsonl"),
        (["--max-cost", "1"], "--max-cost: needs --price"),
        (["--price", "x"], "--price: found 'x'"),
        (["--judge-key-env", "NO_SUCH_KEY_HERE"], "NO_SUCH_KEY_HERE"),
        (["--limit", "5", "--questions", "more.jsonl"], "question 99 has no answer in"),
        (["--questions", "fewer.jsonl"], "question_id 84 is not in"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(uft: Uft, further: list[str], said: str) -> None:
    write_answers(uft.folder / "few.jsonl", [["a", "b"], ["a", "b"]])
    write_rows(uft.folder / "more.jsonl", [*QUESTIONS, QUESTIONS[0] | {"question_id": 99}])
    write_rows(uft.folder / "fewer.jsonl", QUESTIONS[:3])
    words = [uft.folder / word if word.endswith((".jsonl", ".json")) else word for word in further]
    with judge(as_told) as at:
        code, _, err = uft.mt_bench(at, *words)
    assert (code, at.asked) == (2, [])
    assert said in err
    assert not (uft.folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_template": "{question} [[rating]]"}, "lacks {answer}"),
        ({"prompt_template": "{question} {answer} {answer_2} [[rating]]"}, "{answer_2} has no meaning in single-v1"),
        ({"prompt_template": "{question} {answer}"}, "asks for no [[rating]]"),
        ({"prompt_template": 3}, "prompt_template: found"),
    ],
)
def test_prompts_that_could_not_be_filled_are_refused(uft: Uft, change: dict[str, Any], said: str) -> None:
    rows = [{"name": name, **prompt} for name, prompt in PROMPTS.items()]
    write_rows(uft.folder / "p.jsonl", [rows[0] | change, *rows[1:]])
    with judge(as_told) as at:
        code, _, err = uft.mt_bench(at, "--prompts", uft.folder / "p.jsonl")
    assert code == 2
    assert f"{uft.folder / 'p.jsonl'}:1: " in err
    assert said in err


def test_two_judged_models_are_compared(uft: Uft) -> None:
    """By `uft compare`, in pairs and with the judge's name; not where one was graded by other prompts."""
    write_answers(uft.folder / "b.jsonl", [[f"grade {1 + 2 * n}", f"grade {2 + 2 * n}"] for n in range(4)], model="b")
    with judge(as_told) as at:
        assert uft.mt_bench(at, "--out", uft.folder / "of_m")[0] == 0
        assert uft.mt_bench(at, "--out", uft.folder / "of_b", answers="b.jsonl")[0] == 0
        words = ["--out", uft.folder / "other", "--prompts", uft.folder / "p.jsonl"]
        assert uft.mt_bench(at, *words, answers="b.jsonl")[0] == 0
    code, out, err = uft("compare", uft.folder / "of_m", uft.folder / "of_b")
    assert code == 0, err
    assert "MT-Bench" in out
    assert "5.5" in out
    assert "stand-in" in out
    code, _, err = uft("compare", uft.folder / "of_m", uft.folder / "other")
    assert code == 2
    assert "prompts" in err
