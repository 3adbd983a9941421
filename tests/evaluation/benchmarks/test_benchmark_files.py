"""Files of MT-Bench and AlpacaEval: read strictly, by file and line, and written as their own tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks import alpaca_eval, mt_bench
from uft_ds.evaluation.benchmarks.question import Answer

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
ANSWER = {"question_id": 81, "answer_id": "a", "model_id": "m", "choices": [{"index": 0, "turns": ["x", ""]}]}
OUTPUT = {"instruction": "Say it.", "output": "It.", "generator": "m"}


def lines(*values: Any) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


def refusal(read: Any, path: Path, text: str, *options: str) -> str:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as error:
        read(path, *options)
    return str(error.value)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "found [1], expected an object"),
        (lines(QUESTION).strip() + " 7", "found ' 7' behind the object"),
        (QUESTION, "question_id 81 stands at"),
        (QUESTION | {"question_id": "82"}, 'question_id: found "82", expected a whole number'),
        (QUESTION | {"question_id": True}, "question_id: found true"),
        (QUESTION | {"question_id": 82, "turns": ["one"]}, 'turns: found ["one"], expected a list of 2 texts'),
        (QUESTION | {"question_id": 82, "turns": ["one", " "]}, "expected a list of 2 texts"),
        (QUESTION | {"question_id": 82, "turns": "ab"}, 'found "ab"'),
        (QUESTION | {"question_id": 82, "turns": ["a", "\ud800"]}, "is no character"),
        ({"question_id": 82, "turns": ["a", "b"]}, "category: found nothing, expected a text"),
    ],
)
def test_a_bad_question_of_mt_bench_is_named_by_file_and_line(tmp_path: Path, second: Any, said: str) -> None:
    """The third line, behind an empty one."""
    message = refusal(mt_bench.read_questions, tmp_path / "q.jsonl", lines(QUESTION, "", second))
    assert message.startswith(f"{tmp_path / 'q.jsonl'}:3: ")
    assert said in message


def test_questions_are_there(tmp_path: Path) -> None:
    """No file, an empty one, a folder and bytes that are no UTF-8 are refused by name."""
    assert "holds no question" in refusal(mt_bench.read_questions, tmp_path / "q.jsonl", "\n")
    assert "holds no instruction" in refusal(alpaca_eval.read_questions, tmp_path / "q.json", "[]")
    (tmp_path / "latin1").write_bytes("[\xe9]".encode("latin-1"))
    for path in (tmp_path, tmp_path / "none", tmp_path / "latin1"):
        with pytest.raises(UserError, match="cannot be read"):
            mt_bench.read_questions(path)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('{"instruction": "a"}', 1, "expected one JSON list"),
        ('[\n{"instruction": "a"},\n{"instruction": ""}\n]', 3, 'instruction: found "", expected a text'),
        ('[\n{"instruction": "a"},\n\n7]', 4, "found 7, expected an object"),
        ('[\n{"instruction": "a"}\n{"instruction": "b"}]', 3, "expected a comma or ]"),
        ('[\n{"instruction": "a"},\n{"instruction": }]', 3, "not valid JSON"),
        ('[{"instruction": "a"},\n{"instruction": "b", "dataset": 3}]', 2, "dataset: found 3"),
        ('[{"instruction": "a"}\n', 2, "expected a comma or ]"),
    ],
)
def test_a_bad_instruction_of_alpaca_eval_is_named_by_file_and_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    """Though its file is one list."""
    message = refusal(alpaca_eval.read_questions, tmp_path / "q.json", text)
    assert message.startswith(f"{tmp_path / 'q.json'}:{line}: ")
    assert said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": []}, "choices: found []"),
        ({"choices": [{"turns": ["only one"]}]}, "expected a list of 2 texts"),
        ({"model_id": 3}, "model_id: found 3"),
        ({"question_id": 82, "model_id": "other"}, "answers of 2 models"),
    ],
)
def test_a_bad_answer_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """An empty answer is none of them: a model may say nothing."""
    text = lines(ANSWER, ANSWER | {"question_id": 83} | change)
    assert said in refusal(mt_bench.read_answers, tmp_path / "a.jsonl", text, "ANSWERS")


def test_answers_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Text with line ends of other scripts and quotes stays what it is; the id is of the content."""
    answers = [Answer(81, ("a\u2028b\x85", '"{}"'), (1, 2), (True, False)), Answer(82, ("ß", ""), (1, 0), (True, True))]
    text = "".join(mt_bench.answer_lines(answers, "m", 7.5))
    assert text == "".join(mt_bench.answer_lines(answers, "m", 7.5))
    (tmp_path / "a.jsonl").write_text(text)
    found = mt_bench.read_answers(tmp_path / "a.jsonl", "ANSWERS")
    assert [found[answer.key].turns for answer in answers] == [answer.turns for answer in answers]
    first = json.loads(text.split("\n")[0])
    assert set(first) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (first["model_id"], first["tstamp"], first["choices"][0]["index"]) == ("m", 7.5, 0)


def test_outputs_are_read_as_they_are_written(tmp_path: Path) -> None:
    """With the data set of the question, where it has one; the same instruction may be there twice."""
    (tmp_path / "q.json").write_text(
        json.dumps([{"instruction": "a", "dataset": "koala"}, {"instruction": "b"}, {"instruction": "b"}])
    )
    questions = alpaca_eval.read_questions(tmp_path / "q.json")
    answers = [Answer(key, (text,), (1,), (True,)) for key, text in enumerate(("x", "y\u2028", "z"))]
    (tmp_path / "o.json").write_text(alpaca_eval.outputs_text(questions, reversed(answers), "m"))
    assert json.loads((tmp_path / "o.json").read_text()) == [
        {"instruction": "a", "output": "x", "generator": "m", "dataset": "koala"},
        {"instruction": "b", "output": "y\u2028", "generator": "m"},
        {"instruction": "b", "output": "z", "generator": "m"},
    ]
    found = alpaca_eval.read_outputs(tmp_path / "o.json", "ANSWERS")
    assert [one.output for one in found] == ["x", "y\u2028", "z"]


def test_outputs_of_several_models_are_refused(tmp_path: Path) -> None:
    text = json.dumps([OUTPUT, OUTPUT | {"generator": "other"}])
    assert "outputs of 2 models" in refusal(alpaca_eval.read_outputs, tmp_path / "o.json", text, "--against")


def test_the_published_questions_and_references_are_read(test_data: Path) -> None:
    """80 questions of eight categories with a temperature each, and 30 references."""
    questions = mt_bench.read_questions(test_data / "mt_bench" / "question.jsonl")
    assert len(questions) == 80
    assert {question.category for question in questions} == set(mt_bench.TEMPERATURES)
    references = mt_bench.read_answers(test_data / "mt_bench" / "reference_answer_gpt-4.jsonl", "--references")
    assert len(references) == 30
    assert {question.category for question in questions if question.key in references} == {
        "reasoning",
        "math",
        "coding",
    }
