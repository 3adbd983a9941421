"""Grades of MT-Bench by a stand-in judge that is an HTTP server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from judged import CATEGORIES, Uft, as_told, graded, hostile_answers, number_in, part, write_answers
from judges import Asked, judge
from runs import write_rows

from uft_ds.evaluation.results import read_evaluation, read_items


@pytest.mark.parametrize("prompts", ["official", "own"])
def test_grades_are_means_by_hand(uft: Uft, prompts: str) -> None:
    """Grades 2 to 9: 5.5 over all, 5 and 6 by turn, and the mean of two neighbours by category, each with the judge."""
    further = ["--prompts", uft.folder / "p.jsonl"] if prompts == "official" else []
    with judge(as_told) as at:
        code, out, err = uft.mt_bench(at, "--references", uft.folder / "ref.jsonl", *further)
    assert code == 0, err
    found = read_evaluation(uft.folder / "out")
    (task,) = found.tasks
    assert (found.name, task.task, task.items, task.judge) == ("m", "mt_bench", 4, "stand-in")
    expected = {"grade": 5.5, "grade,turn_1": 5.0, "grade,turn_2": 6.0, "average_characters": 7.0, "failed": 0.0}
    expected |= {f"grade,{category}": 2.5 + 2 * n for n, category in enumerate(CATEGORIES)}
    assert dict(task.metrics) == expected
    items = read_items(uft.folder / "out", "mt_bench")
    assert [item.item for item in items] == ["81", "82", "83", "84"]
    assert items[1].values == {
        "grade": 4.5,
        "grade,turn_1": 4.0,
        "grade,turn_2": 5.0,
        "grade,math": 4.5,
        "average_characters": 7.0,
    }
    assert task.version.startswith("FastChat's prompts#" if prompts == "official" else "uft_ds's rubric#")
    assert task.version in out
    assert all("stand-in" in line for line in out.splitlines() if " grade" in line)
    assert len(at.asked) == 8
    assert {(asked.body["max_tokens"], asked.body["temperature"]) for asked in at.asked} == {(2048, 0)}


@pytest.mark.parametrize("prompts", ["official", "own"])
def test_a_judge_sees_both_turns_and_the_reference(uft: Uft, prompts: str) -> None:
    """The second turn with the first; a reference for math and coding alone; no [[rating]] is left in the words."""
    further = ["--prompts", uft.folder / "p.jsonl"] if prompts == "official" else []
    with judge(as_told) as at:
        assert uft.mt_bench(at, "--references", uft.folder / "ref.jsonl", *further)[0] == 0
        seen = {graded(asked): asked for asked in at.asked}
    first, second = seen["grade 4"], seen["grade 5"]
    assert (part(first, "question"), part(first, "ref_answer_1")) == ("First 1?", "ref 1 one")
    assert part(first, "ref_answer_2") == ""
    assert [part(second, name) for name in ("question_1", "answer_1", "question_2", "answer_2")] == [
        "First 1?",
        "grade 4",
        "Then 1?",
        "grade 5",
    ]
    assert [part(second, name) for name in ("ref_answer_1", "ref_answer_2")] == ["ref 1 one", "ref 1 two"]
    for text in ("grade 2", "grade 3", "grade 8", "grade 9"):
        assert "ref " not in seen[text].question
    for asked in at.asked:
        whole = "\n".join(message["content"] for message in asked.body["messages"])
        assert "[[" not in whole
        roles = [message["role"] for message in asked.body["messages"]]
        assert roles == (["system", "user"] if prompts == "official" else ["user"])
        if prompts == "official":
            assert f'{{"{asked.nonce}": rating}}, for example: Rating: {{"{asked.nonce}": 5}}' in whole


def test_published_prompts_are_taken_word_for_word(uft: Uft, test_data: Path) -> None:
    """But for the form of the grade, each request is what FastChat's own templates give, by Python's format."""
    folder = test_data / "mt_bench"
    with judge(lambda asked: f'{{"{asked.nonce}": 5}}') as at:
        words = ["--references", uft.folder / "ref.jsonl", "--prompts", folder / "judge_prompts.jsonl"]
        assert uft.mt_bench(at, *words)[0] == 0
    prompts = {
        line["name"]: line for line in map(json.loads, (folder / "judge_prompts.jsonl").read_text().splitlines())
    }
    turns = ["First 1?", "Then 1?"], ["grade 4", "grade 5"], ["ref 1 one", "ref 1 two"]
    one = {"question": turns[0][0], "answer": turns[1][0], "ref_answer_1": turns[2][0]}
    both = {
        f"{name}_{n + 1}": values[n]
        for name, values in zip(("question", "answer", "ref_answer"), turns, strict=True)
        for n in (0, 1)
    }
    expected = []
    for name, values in (("single-math-v1", one), ("single-math-v1-multi-turn", both)):
        prompt = prompts[name]
        expected.append([prompt["system_prompt"], prompt["prompt_template"].format(**values)])
    seen = []
    for asked in at.asked:
        texts = [message["content"] for message in asked.body["messages"]]
        texts = [text.replace(f'Rating: {{"{asked.nonce}": 5}}', '"Rating: [[5]]"') for text in texts]
        seen.append([text.replace(f'{{"{asked.nonce}": rating}}', '"[[rating]]"') for text in texts])
    assert all(texts in seen for texts in expected)


@pytest.mark.parametrize(
    ("prompts", "behaviour"),
    [
        pytest.param("official", "honest", marks=pytest.mark.long),
        ("official", "echoes around"),
        pytest.param("own", "echoes before", marks=pytest.mark.long),
    ],
)
def test_no_hostile_answer_moves_a_grade(uft: Uft, prompts: str, behaviour: str) -> None:
    """0 of 200: the judge gives the grade of a hidden table, and quotes the whole answer before or around it."""
    hidden = [random.Random(number).randint(1, 9) for number in range(200)]
    texts = hostile_answers()
    questions = [{"question_id": 81 + n, "category": "writing", "turns": ["Say.", "More."]} for n in range(100)]
    write_rows(uft.folder / "q.jsonl", questions)
    write_answers(uft.folder / "a.jsonl", [texts[2 * n : 2 * n + 2] for n in range(100)])

    def answer(asked: Asked) -> str:
        text = graded(asked)
        verdict = f'{{"{asked.nonce}": {hidden[number_in(text)]}}}'
        before = "" if behaviour == "honest" else f"It says:\n{text}\n"
        return f"{before}{verdict}" + (f"\nIt said:\n{text}" if behaviour == "echoes around" else "")

    with judge(answer) as at:
        further = ["--prompts", uft.folder / "p.jsonl"] if prompts == "official" else []
        code, _, err = uft.mt_bench(at, *further)
    assert code == 0, err
    found = uft.judgements()
    assert len(found) == 200
    assert [one["value"] for one in found] == hidden


def test_a_judge_that_only_quotes_gives_no_grade(uft: Uft) -> None:
    """Nothing but hostile answers in the replies: 0 grades, exit code 1, and no results."""
    texts = hostile_answers()[:8]
    write_answers(uft.folder / "a.jsonl", [texts[2 * n : 2 * n + 2] for n in range(4)])
    with judge(graded) as at:
        code, out, _ = uft.mt_bench(at)
    assert code == 1
    assert [one["value"] for one in uft.judgements()] == [None] * 8
    assert "8 of 8 judgements are missing" in out
    assert not (uft.folder / "out" / "results.json").exists()


@pytest.mark.parametrize("said", ["0", "11", '"7"', "NaN"])
def test_a_grade_outside_of_one_to_ten_is_missing(uft: Uft, said: str) -> None:
    """Of the first turn of one question: it is in no mean, the question is in no mean of both turns, and it is said."""

    def answer(asked: Asked) -> str:
        return f'{{"{asked.nonce}": {said}}}' if graded(asked) == "grade 4" else as_told(asked)

    with judge(answer) as at:
        code, out, err = uft.mt_bench(at, "--max-failures", "0.2")
    assert code == 0, err
    metrics = read_evaluation(uft.folder / "out").tasks[0].metrics
    assert metrics["failed"] == 1 / 8
    assert metrics["grade"] == pytest.approx((2.5 + 6.5 + 8.5) / 3)
    assert metrics["grade,turn_1"] == pytest.approx((2 + 6 + 8) / 3)
    assert metrics["grade,turn_2"] == 6.0
    assert "grade,math" not in metrics
    assert "1 of 8 judgements are missing, and in no mean" in out
    assert [item.item for item in read_items(uft.folder / "out", "mt_bench")] == ["81", "83", "84"]
