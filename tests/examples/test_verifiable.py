"""The verifiable instructions: what a response is worth, and that the files say nothing else."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uft_ds.errors import UserError
from uft_ds.examples.verifiable import (
    FLAWS,
    TASK_KINDS,
    Task,
    VerifiableData,
    flawed_response,
    generate,
    grade,
    is_correct,
    read_tasks,
    write,
)
from uft_ds.examples.verifiable_tasks import SCORE_MEANINGS, payload

CAPITALS = Task("capitals", "Write in capital letters: red apple", "RED APPLE")
LOWER_CASE = Task("lower_case", "Write in lower case: RED APPLE", "red apple")
JSON_FIELDS = Task("json_fields", "Write as JSON with keys name and age: Mia is 31.", '{"name": "Mia", "age": 31}')
FIRST_WORD = Task("first_word", "Reply with only the first word: apple river stone", "apple")
QUOTES = Task("quotes", "Repeat in double quotes: red apple", '"red apple"')
PIPES = Task("pipes", 'Join the words with " | ": apple, river, stone', "apple | river | stone")
BULLETS = Task("bullets", 'List one per line after "- ": apple, river', "- apple\n- river")
BOLD = Task("bold", "Wrap in <b></b> tags: red apple", "<b>red apple</b>")
INITIALS = Task("initials", "Write only the initials, like A.B.: Mia Stone", "M.S.")
COUNT_WORD = Task("count_word", 'Count the word "sea". Write the digit only: sea ice sea map', "2")


@pytest.fixture(scope="module")
def data() -> VerifiableData:
    return generate(2400, 100, seed=0)


@pytest.fixture(scope="module")
def with_scored(data: VerifiableData) -> VerifiableData:
    return generate(2400, 100, seed=0, num_held_out_scored=22)


def all_tasks(data: VerifiableData) -> list[Task]:
    return [row.task for row in data.instruction_rows] + list(data.held_out_tasks)


def test_same_seed_same_data(data: VerifiableData) -> None:
    """The data is a function of its arguments; another seed gives other prompts."""
    assert generate(2400, 100, seed=0) == data
    assert generate(2400, 100, seed=1) != data


def test_first_row_is_the_same_on_every_machine(data: VerifiableData) -> None:
    """A committed row: Python's per-process hash seed, or an edit of the word lists, would change it."""
    assert data.held_out_tasks[0] == FIRST_HELD_OUT


FIRST_HELD_OUT = Task("capitals", "Write in capital letters: fast lamp", "FAST LAMP")


def test_held_out_tasks_do_not_depend_on_the_training_size(data: VerifiableData) -> None:
    """Runs on more or less data are compared on the same questions."""
    assert generate(110, 100, seed=0).held_out_tasks == data.held_out_tasks


def test_prompts_are_distinct_and_held_out_ones_unseen(data: VerifiableData) -> None:
    """2,400 + 100 prompts, all different, also after rephrasing: no two of a kind share a payload."""
    tasks = all_tasks(data)
    assert len({task.prompt for task in tasks}) == 2500
    assert len({(task.kind, payload(task)) for task in tasks}) == 2500


def test_scored_held_out_rows_change_nothing_else(data: VerifiableData, with_scored: VerifiableData) -> None:
    """Their prompts are drawn after all others: not a row of the other parts depends on them."""
    assert data.held_out_scored_rows == ()
    assert replace(with_scored, held_out_scored_rows=()) == data


def test_the_quickstarts_training_data_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Committed hashes: the order of a run's data and the questions that measure it follow from these bytes."""
    write(tmp_path)
    found = {name: sha256((tmp_path / name).read_bytes()).hexdigest()[:16] for name in HASHES}
    assert found == HASHES


HASHES = {
    "instruction.jsonl": "a3c682e2881aa1a2",
    "scored.jsonl": "097dd238db5ec018",
    "held_out.jsonl": "c200d8451279c47b",
}


def test_scored_held_out_rows_ask_what_nothing_else_asks(with_scored: VerifiableData) -> None:
    """Two prompts of each kind, of which no payload is trained on or among the held-out tasks."""
    tasks = list(dict.fromkeys(row.task for row in with_scored.held_out_scored_rows))
    assert Counter(task.kind for task in tasks) == dict.fromkeys(TASK_KINDS, 2)
    others = {(task.kind, payload(task)) for task in all_tasks(with_scored)}
    assert not others & {(task.kind, payload(task)) for task in tasks}


def test_scored_held_out_rows_can_be_ordered(with_scored: VerifiableData) -> None:
    """The three answers to a prompt follow each other: the right one, and two others with lower scores."""
    rows = with_scored.held_out_scored_rows
    assert len(rows) == 66
    for first in range(0, 66, 3):
        right, *flawed = rows[first : first + 3]
        assert {row.task for row in flawed} == {right.task}
        assert right.response == right.task.answer
        assert right.score == 1.0
        assert len({row.response for row in (right, *flawed)}) == 3
        assert all(row.score == grade(row.task, row.response) < 1 for row in flawed)
    assert len({row.score for row in rows}) >= 5


def test_both_training_sets_answer_the_same_prompts(data: VerifiableData) -> None:
    """Row i of each set has the same task; instruction rows carry the answer and no score."""
    assert [row.task for row in data.instruction_rows] == [row.task for row in data.scored_rows]
    assert all(row.response == row.task.answer and row.score is None for row in data.instruction_rows)


def test_kinds_are_balanced(data: VerifiableData) -> None:
    """At least 8 kinds, whose counts differ by at most one in each set."""
    assert len(TASK_KINDS) >= 8
    for tasks in ([row.task for row in data.scored_rows], data.held_out_tasks):
        counts = Counter(task.kind for task in tasks)
        assert set(counts) == set(TASK_KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_texts_are_short(data: VerifiableData) -> None:
    """The quickstart trains on a CPU: every text stays under 110 characters, about 30 tokens."""
    assert max(len(task.prompt) for task in all_tasks(data)) <= 110
    assert max(len(row.response) for row in data.scored_rows) <= 110


def test_answers_are_right_and_not_in_plain_sight(data: VerifiableData) -> None:
    """Every answer grades 1, and giving back the prompt or its payload grades at most 0.1."""
    for task in all_tasks(data):
        assert is_correct(task, task.answer)
        assert grade(task, task.prompt) <= 0.1
        assert grade(task, payload(task)) <= 0.1


def test_flawed_responses_are_below_one(data: VerifiableData) -> None:
    """A flawed response never grades 1, whatever the task; every flaw can be drawn for every kind."""
    rng = random.Random("flaws")
    for task in all_tasks(data):
        assert grade(task, flawed_response(task, rng)) < 1
    for task in data.held_out_tasks:
        assert all(isinstance(flaw(task, rng), str) for flaw in FLAWS)


def test_scores_span_the_scale(data: VerifiableData) -> None:
    """All seven values occur, each in at least 5% of the rows, and 25-40% of the rows are right."""
    counts = Counter(row.score for row in data.scored_rows)
    assert set(counts) == set(SCORE_MEANINGS)
    assert min(counts.values()) >= 0.05 * len(data.scored_rows)
    assert 0.25 <= counts[1.0] / len(data.scored_rows) <= 0.4


@pytest.mark.parametrize("task", [CAPITALS, JSON_FIELDS, FIRST_WORD, BULLETS, INITIALS, COUNT_WORD])
@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "\n\t\n",
        ".",
        "Sure! Here it is:",
        "I am sorry, I cannot do that.",
        "{",
        '{"',
        "\x00",
        "é" * 50,
    ],
)
def test_saying_nothing_is_worth_nothing(task: Task, response: str) -> None:
    """Empty, blank and chatter-only responses grade 0."""
    assert grade(task, response) == 0.0


@pytest.mark.parametrize(
    ("task", "response", "score"),
    [
        (CAPITALS, "RED APPLE \n", 1.0),
        (CAPITALS, " RED APPLE", 0.7),
        (CAPITALS, '"RED APPLE".', 0.7),
        (CAPITALS, "Here it is: RED APPLE", 0.5),
        (CAPITALS, 'The phrase "red apple" in capital letters is "RED APPLE".', 0.5),
        (CAPITALS, "Red Apple", 0.3),
        (CAPITALS, "Here it is: Red Apple", 0.2),
        (CAPITALS, "RED APPLE RED APPLE", 0.2),
        (CAPITALS, "red apple", 0.1),
        (CAPITALS, "APPLE RED", 0.1),
        (CAPITALS, "RED", 0.0),
        (CAPITALS, "REDAPPLES", 0.0),
        (LOWER_CASE, "red apple", 1.0),
        (LOWER_CASE, "Red apple", 0.3),
        (LOWER_CASE, "RED APPLE", 0.1),
        (JSON_FIELDS, '{"age":31,"name":"Mia"}', 1.0),
        (JSON_FIELDS, '```\n{ "name": "Mia", "age": 31 }\n```', 0.7),
        (JSON_FIELDS, 'Sure: {"name":"Mia","age":31}', 0.5),
        (JSON_FIELDS, '{"name": "Mia", "age": "31"}', 0.3),
        (JSON_FIELDS, "name: Mia, age: 31", 0.3),
        (JSON_FIELDS, '{"name": "Mia", "age": 31.0}', 0.2),
        (JSON_FIELDS, '{"name": "Mia", "age": 31, "age": 31}', 0.2),
        (JSON_FIELDS, '{"name": "Mia", "age": 32}', 0.0),
        (JSON_FIELDS, "Mia is 31.", 0.0),
        (FIRST_WORD, "apple", 1.0),
        (FIRST_WORD, "apple.", 0.7),
        (FIRST_WORD, 'The first word of "apple river stone" is apple', 0.5),
        (FIRST_WORD, "Reply with only the first word: apple river stone apple", 0.5),
        (FIRST_WORD, "apple apple", 0.2),
        (FIRST_WORD, "Apple", 0.3),
        (FIRST_WORD, "It is Apple", 0.2),
        (FIRST_WORD, "apple or river", 0.1),
        (FIRST_WORD, "Apple River", 0.1),
        (FIRST_WORD, "apple, river, stone", 0.1),
        (FIRST_WORD, "river", 0.0),
        (FIRST_WORD, "pineapple", 0.0),
        (QUOTES, '"red apple"', 1.0),
        (QUOTES, "'red apple'", 0.3),
        (QUOTES, "red apple", 0.1),
        (PIPES, "apple | river | stone", 1.0),
        (PIPES, 'Join the words with " | ": apple, river, stone\napple | river | stone', 0.5),
        (PIPES, "apple|river|stone", 0.3),
        (PIPES, "apple | river | stone | moon", 0.2),
        (PIPES, "apple, river, stone", 0.1),
        (PIPES, "apple | river", 0.0),
        (BULLETS, "- apple\n- river\n", 1.0),
        (BULLETS, "1. apple\n2. river", 0.3),
        (BULLETS, "- apple\n- river\n- moon", 0.2),
        (BULLETS, "apple, river", 0.1),
        (BOLD, "**<b>red apple</b>**", 0.7),
        (BOLD, "**red apple**", 0.3),
        (BOLD, "<b>red</b> <b>apple</b>", 0.3),
        (BOLD, "red apple", 0.1),
        (INITIALS, "MS", 0.3),
        (INITIALS, "The initials are MS", 0.2),
        (INITIALS, "S.M.", 0.1),
        (INITIALS, "Mia Stone", 0.0),
        (COUNT_WORD, "2", 1.0),
        (COUNT_WORD, 'The word "sea" occurs 2 times.', 0.5),
        (COUNT_WORD, "Two", 0.3),
        (COUNT_WORD, "It occurs two times", 0.2),
        (COUNT_WORD, "2 or 3", 0.1),
        (COUNT_WORD, "1 2 3 4", 0.1),
        (COUNT_WORD, "two, maybe three", 0.1),
        (COUNT_WORD, "22", 0.0),
        (COUNT_WORD, "3", 0.0),
    ],
)
def test_grades(task: Task, response: str, score: float) -> None:
    """One response per line and what it is worth."""
    assert grade(task, response) == score


@given(st.sampled_from([CAPITALS, JSON_FIELDS, FIRST_WORD, PIPES, BOLD, COUNT_WORD]), st.text())
def test_any_text_has_a_grade(task: Task, response: str) -> None:
    """A model may say anything: grading never fails, and only the seven values come out."""
    assert grade(task, response) in SCORE_MEANINGS


@pytest.mark.parametrize("response", ["{" * 5000, '{"a":' * 5000, "apple " * 5000, "A." * 5000, "- a\n" * 5000])
def test_long_rambling_is_graded_quickly(response: str) -> None:
    """Deep or endless responses neither overflow a parser nor grade 1."""
    assert all(grade(task, response) < 1 for task in (CAPITALS, JSON_FIELDS, FIRST_WORD, INITIALS, BULLETS))


def test_written_scores_equal_a_fresh_grade(tmp_path: Path) -> None:
    """From the files alone: the agreed keys, scores that `grade` gives again, no temporary file left."""
    write(tmp_path, num_prompts=330, num_held_out=33, seed=3, num_held_out_scored=11)
    names = {"instruction.jsonl", "scored.jsonl", "held_out.jsonl", "held_out_scored.jsonl", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name, keys, num_rows in [
        ("instruction.jsonl", {"prompt", "response", "meta"}, 330),
        ("scored.jsonl", {"prompt", "response", "score", "meta"}, 330),
        ("held_out.jsonl", {"prompt", "response", "meta"}, 33),
        ("held_out_scored.jsonl", {"prompt", "response", "score", "meta"}, 33),
    ]:
        rows = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == num_rows
        assert all(set(row) == keys for row in rows)
        for task, row in zip(read_tasks(tmp_path / name), rows, strict=True):
            assert grade(task, row["response"]) == row.get("score", 1.0)


def test_tasks_survive_the_round_trip(tmp_path: Path) -> None:
    """What is read back is what was held out, and writing again changes no byte."""
    data = write(tmp_path, num_prompts=44, num_held_out=22, seed=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert read_tasks(tmp_path / "held_out.jsonl") == data.held_out_tasks
    write(tmp_path, num_prompts=44, num_held_out=22, seed=5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_data_card_gives_counts_scores_seed_and_licence(tmp_path: Path) -> None:
    """The card's table has 4 training, 2 held-out and 1 scored prompts for each of the kinds."""
    kinds = len(TASK_KINDS)
    data = write(tmp_path, num_prompts=4 * kinds, num_held_out=2 * kinds, seed=5, num_held_out_scored=kinds)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"| {kind} | 4 | 2 | 1 |" in card for kind in TASK_KINDS)
    assert all(meaning in card for meaning in SCORE_MEANINGS.values())
    assert f"{3 * kinds} scored responses to {kinds} more" in card
    right = sum(row.score == 1.0 for row in data.scored_rows)
    assert f"| {SCORE_MEANINGS[1.0]} | {right} | {kinds} |" in card
    assert "seed 5" in card
    assert "Apache-2.0" in card


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "needs a JSON object"),
        ('{"prompt": "x: y", "response": "z"}', "needs a JSON object"),
        ("[]", "needs a JSON object"),
        ('{"prompt": "x: y", "meta": {"kind": "poem", "answer": "z"}}', "unknown kind 'poem'"),
    ],
)
def test_bad_task_files_are_named_by_line(tmp_path: Path, line: str, problem: str) -> None:
    """A bad second line is reported with its file and number."""
    good = json.dumps({"prompt": CAPITALS.prompt, "meta": {"kind": "capitals", "answer": CAPITALS.answer}})
    path = tmp_path / "held_out.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"held_out\.jsonl:2: {problem}"):
        read_tasks(path)


def test_asking_for_too_many_prompts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind with one payload cannot give two distinct prompts: an error, not an endless loop."""
    monkeypatch.setattr("uft_ds.examples.verifiable.TASK_KINDS", {"capitals": lambda rng: CAPITALS})
    with pytest.raises(UserError, match="no more distinct prompts after 1"):
        generate(2, 0, seed=0)
