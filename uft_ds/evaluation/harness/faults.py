"""What is wrong with a row of a data folder, in words: what lm-evaluation-harness would fail on, or count as no answer.

It would fail on one row in the middle of the evaluation, and on some when all questions are answered. A right answer
that is none of the choices would count against every model, without a word.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
_GSM8K = re.compile(r"#### -?[0-9.,]+")
"""What the harness reads of an answer."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def none(row: Row) -> None:
    """All rows with the columns can be asked."""


def of_ifeval(row: Row) -> str | None:
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs):
        return "instruction_id_list and kwargs are not two lists of the same length"
    try:
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ModuleNotFoundError:
        return None  # the task itself says what is not installed
    unknown = [one for one in ids if str(one) not in INSTRUCTION_DICT]
    return f"instruction_id_list: found {unknown[0]!r}, of which IFEval knows nothing" if unknown else None


def of_gsm8k(row: Row) -> str | None:
    is_right = isinstance(row["answer"], str) and _GSM8K.search(row["answer"])
    return None if is_right else f"answer: found {_short(row['answer'])}; expected a text that ends with #### NUMBER"


def of_truthfulqa(row: Row) -> str | None:
    for name in ("mc1_targets", "mc2_targets"):
        targets = row[name]
        choices, labels = (targets.get(key) if isinstance(targets, dict) else None for key in ("choices", "labels"))
        if not (isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)):
            return f"{name}: expected choices and labels, two lists of the same length"
        if 1 not in labels or (name == "mc1_targets" and labels[0] != 1):
            return f"{name}: found labels {_short(labels)}; expected 1 for what is right, in mc1_targets for the first"
    return None


def of_arc(row: Row) -> str | None:
    choices = row["choices"]
    text, label = (choices.get(key) if isinstance(choices, dict) else None for key in ("text", "label"))
    if not (isinstance(text, list) and isinstance(label, list) and len(text) == len(label)):
        return "choices: expected text and label, two lists of the same length"
    return None if row["answerKey"] in label else f"answerKey: found {row['answerKey']!r}; expected one of {label}"


def of_winogrande(row: Row) -> str | None:
    if "_" not in str(row["sentence"]):
        return f"sentence: found {_short(row['sentence'])}; expected a _ in the place of the option"
    return None if row["answer"] in ("1", "2") else f'answer: found {row["answer"]!r}; expected "1" or "2", a text'


def of_hellaswag(row: Row) -> str | None:
    if not isinstance(row["endings"], list):
        return f"endings: found {_short(row['endings'])}; expected a list"
    known = [str(place) for place in range(len(row["endings"]))]
    return None if str(row["label"]) in known else f"label: found {row['label']!r}; expected one of {', '.join(known)}"


def of_mmlu(row: Row) -> str | None:
    if not (isinstance(row["choices"], list) and len(row["choices"]) == 4):
        return f"choices: found {_short(row['choices'])}; expected a list of four"
    return _of_place(row["answer"], 4)


def of_mmlu_pro(row: Row) -> str | None:
    if not (isinstance(row["options"], list) and 1 < len(row["options"]) <= len(_LETTERS)):
        return f"options: found {_short(row['options'])}; expected a list of at least two"
    return _of_place(row["answer"], len(row["options"]))


def of_math(row: Row) -> str | None:
    is_level = isinstance(row["level"], str) and row["level"].startswith("Level ")
    return None if is_level else f'level: found {row["level"]!r}; expected a text such as "Level 5"'


def of_musr(row: Row) -> str | None:
    try:
        choices = ast.literal_eval(row["choices"])
    except (ValueError, SyntaxError, TypeError):
        choices = None
    if isinstance(choices, list):
        return None
    return f"choices: found {_short(row['choices'])}; expected a list that is written as a text, as \"['Ann', 'Bob']\""


def _of_place(answer: object, count: int) -> str | None:
    """The harness takes the number of the right choice and its letter."""
    is_number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count
    if is_number or (isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS[:count]):
        return None
    last = _LETTERS[count - 1]
    return f"answer: found {answer!r}; expected a number from 0 to {count - 1}, or a letter from A to {last}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
