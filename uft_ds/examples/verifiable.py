"""A generator of verifiable instructions: short tasks with true scores, for the quickstart and for tests.

    generate(num_prompts, num_held_out, seed) -> instruction rows, scored rows, held-out tasks and scored rows
    write(folder, ...)                        -> the same as JSONL, with a data card
    read_tasks(folder / "held_out.jsonl")     -> tasks to grade a trained model's responses with

All scores come from `grade`: a model's gain is measured by the same rule as its training scores.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.examples.verifiable_tasks import (
    ADJECTIVES,
    EXACT,
    NAMES,
    NOUNS,
    NUMBER_WORDS,
    SCORE_MEANINGS,
    TASK_KINDS,
    Task,
    grade,
    is_correct,
    payload,
)

__all__ = [
    "TASK_KINDS",
    "Row",
    "Task",
    "VerifiableData",
    "flawed_response",
    "generate",
    "grade",
    "is_correct",
    "read_tasks",
    "write",
]

RIGHT_FRACTION = 0.3
"""Share of right answers among the scored rows. The rest are flawed: the instruction rows already show right ones."""

HELD_OUT_FLAWS = 2
"""Flawed answers to each prompt of the scored held-out rows, beside the right one: about RIGHT_FRACTION are right."""

MAX_DRAWS = 1000
"""Consecutive draws without a new task after which a kind counts as exhausted."""


@dataclass(frozen=True)
class Row:
    """One line of a JSONL file: a response to a task, with its score where the file has scores."""

    task: Task
    response: str
    score: float | None = None

    def to_json(self) -> str:
        """Keys `prompt`, `response`, `score` (if scored), `meta`; meta lets anyone grade the row again."""
        score = {} if self.score is None else {"score": self.score}
        meta = {"kind": self.task.kind, "answer": self.task.answer}
        row = {"prompt": self.task.prompt, "response": self.response, **score, "meta": meta}
        return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True)
class VerifiableData:
    """Row i of both training sets answers the same prompt; the held-out tasks share no prompt with them.

    held_out_scored_rows: right and flawed answers, one after another, to prompts that are in none of the other parts.
    """

    instruction_rows: tuple[Row, ...]
    scored_rows: tuple[Row, ...]
    held_out_tasks: tuple[Task, ...]
    held_out_scored_rows: tuple[Row, ...] = ()


def generate(num_prompts: int, num_held_out: int, seed: int, num_held_out_scored: int = 0) -> VerifiableData:
    """Generate all data. Kinds alternate, so any prefix is balanced; held-out tasks depend on num_held_out and seed.

    Args:
        num_held_out_scored: prompts of the scored held-out rows, each with one right answer and HELD_OUT_FLAWS flawed
            ones. No other part depends on it; these rows depend on all four arguments.
    Raises:
        UserError: a kind has fewer distinct prompts.
    """
    held_out_counts, train_counts = _kind_counts(num_held_out), _kind_counts(num_prompts)
    scored_counts = _kind_counts(num_held_out_scored)
    held_out: dict[str, list[Task]] = {}
    train: dict[str, list[Task]] = {}
    held_out_scored: dict[str, list[Task]] = {}
    for kind in TASK_KINDS:
        fresh = _distinct_tasks(kind, random.Random(f"verifiable/{seed}/{kind}"))
        held_out[kind] = [next(fresh) for _ in range(held_out_counts[kind])]
        train[kind] = [next(fresh) for _ in range(train_counts[kind])]
        held_out_scored[kind] = [next(fresh) for _ in range(scored_counts[kind])]
    tasks = _take_turns(train)
    rng = random.Random(f"verifiable/{seed}/responses")
    held_out_rng = random.Random(f"verifiable/{seed}/held-out responses")
    return VerifiableData(
        instruction_rows=tuple(Row(task, task.answer) for task in tasks),
        scored_rows=tuple(_scored_row(task, rng) for task in tasks),
        held_out_tasks=_take_turns(held_out),
        held_out_scored_rows=tuple(
            row for task in _take_turns(held_out_scored) for row in _graded_rows(task, held_out_rng)
        ),
    )


def _kind_counts(num_tasks: int) -> dict[str, int]:
    share, extra = divmod(num_tasks, len(TASK_KINDS))
    return {kind: share + (index < extra) for index, kind in enumerate(TASK_KINDS)}


def _distinct_tasks(kind: str, rng: random.Random) -> Iterator[Task]:
    """Tasks of a kind with distinct payloads, so that no held-out prompt is a rephrased training prompt."""
    seen: set[str] = set()
    while True:
        for _ in range(MAX_DRAWS):
            task = TASK_KINDS[kind](rng)
            if payload(task) not in seen:
                break
        else:
            raise UserError(f"kind {kind!r} has no more distinct prompts after {len(seen)}: ask for fewer prompts")
        seen.add(payload(task))
        yield task


def _take_turns(tasks_by_kind: dict[str, list[Task]]) -> tuple[Task, ...]:
    longest = max(len(tasks) for tasks in tasks_by_kind.values())
    return tuple(tasks[i] for i in range(longest) for tasks in tasks_by_kind.values() if i < len(tasks))


def _scored_row(task: Task, rng: random.Random) -> Row:
    response = task.answer if rng.random() < RIGHT_FRACTION else flawed_response(task, rng)
    return Row(task, response, grade(task, response))


def _graded_rows(task: Task, rng: random.Random) -> list[Row]:
    """The right answer and HELD_OUT_FLAWS flawed ones, all different. A step forwards their prompt once."""
    responses = {task.answer: None}
    for _ in range(MAX_DRAWS):
        if len(responses) > HELD_OUT_FLAWS:
            return [Row(task, response, grade(task, response)) for response in responses]
        responses[flawed_response(task, rng)] = None
    raise AssertionError(f"{task} has fewer than {HELD_OUT_FLAWS} different flaws")


# --------------------------------------------------------------------------------------------------------
# Flaws: typical errors of small models


def flawed_response(task: Task, rng: random.Random) -> str:
    """A response with a realistic flaw, graded below 1; drawn again if the flawed text happens to be right."""
    for _ in range(MAX_DRAWS):
        response = rng.choice(FLAWS)(task, rng)
        if grade(task, response) < EXACT:
            return response
    raise AssertionError(f"no flaw leaves {task} wrong")


def _preface(task: Task, rng: random.Random) -> str:
    openings = ("Sure! Here it is: ", "The answer is ", "Here you go:\n", "Of course! ")
    return rng.choice(openings) + task.answer


def _explanation(task: Task, rng: random.Random) -> str:
    closings = ("\nI hope this helps!", "\nThis is the text you asked for.", " is the right answer.")
    return task.answer + rng.choice(closings)


def _repeated_prompt(task: Task, rng: random.Random) -> str:
    return rng.choice((task.prompt, payload(task)))


def _punctuation(task: Task, rng: random.Random) -> str:
    return rng.choice((f"{task.answer}.", f"`{task.answer}`", f"**{task.answer}**"))


def _off_task(task: Task, rng: random.Random) -> str:
    return rng.choice(("I am sorry, I cannot do that.", "Sure! How can I help you?", "Please give me more details."))


def _wrong_answer(task: Task, rng: random.Random) -> str:
    """The right form with one word replaced; another task's answer if it contains no word of the payload."""
    if task.kind in ("first_word", "last_word"):
        return rng.choice(payload(task).split())
    asked = payload(task).replace(",", " ").rstrip(".").split()
    kept = [word for word in asked for form in (word, word.upper(), word.lower()) if form in task.answer]
    if not kept or task.kind in ("initials", "count_word"):
        return TASK_KINDS[task.kind](rng).answer
    old = rng.choice(kept)
    new = _word_like(old, rng)
    for styled in (str, str.upper, str.lower):
        if styled(old) in task.answer:
            return task.answer.replace(styled(old), styled(new), 1)
    raise AssertionError(f"{old!r} was found in {task.answer!r}")


def _word_like(word: str, rng: random.Random) -> str:
    if word.isdigit():
        return str(rng.randint(18, 89))
    if word.istitle():
        return rng.choice(NAMES)
    return rng.choice(ADJECTIVES if word.lower() in ADJECTIVES else NOUNS)


def _wrong_format(task: Task, rng: random.Random) -> str:
    return rng.choice(_MISFORMATS[task.kind](task))


def _chatty_wrong_format(task: Task, rng: random.Random) -> str:
    return rng.choice(("Sure! ", "Here it is: ", "The answer is ")) + _wrong_format(task, rng)


def _miscased(task: Task) -> tuple[str, ...]:
    return task.answer.title(), task.answer.capitalize()


def _unjsoned(task: Task) -> tuple[str, ...]:
    fields = json.loads(task.answer)
    plain = ", ".join(f"{key}: {value}" for key, value in fields.items())
    as_text = json.dumps({key: str(value) for key, value in fields.items()})
    return plain, f"{{{plain}}}", as_text, task.answer.replace('"', "'")


def _requoted(task: Task) -> tuple[str, ...]:
    phrase = payload(task)
    return f"'{phrase}'", f"**{phrase}**", f'{phrase}"'


def _rejoined(task: Task) -> tuple[str, ...]:
    words = payload(task).split(", ")
    return tuple(separator.join(words) for separator in (" - ", "|", " / ", " "))


def _relisted(task: Task) -> tuple[str, ...]:
    words = payload(task).split(", ")
    numbered = "\n".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
    return numbered, "\n".join(f"* {word}" for word in words), " - ".join(words)


def _retagged(task: Task) -> tuple[str, ...]:
    phrase = payload(task)
    return f"**{phrase}**", f"<i>{phrase}</i>", f"<b>{phrase}", f"<strong>{phrase}</strong>"


def _undotted(task: Task) -> tuple[str, ...]:
    return task.answer.replace(".", ""), task.answer.replace(".", " ").strip(), task.answer.lower()


def _in_words(task: Task) -> tuple[str, ...]:
    return tuple(form for word, digit in NUMBER_WORDS.items() if digit == task.answer for form in (word, word.title()))


_MISFORMATS: dict[str, Callable[[Task], tuple[str, ...]]] = {
    "capitals": _miscased,
    "lower_case": _miscased,
    "json_fields": _unjsoned,
    "first_word": _miscased,
    "last_word": _miscased,
    "quotes": _requoted,
    "pipes": _rejoined,
    "bullets": _relisted,
    "bold": _retagged,
    "initials": _undotted,
    "count_word": _in_words,
}

FLAWS: tuple[Callable[[Task, random.Random], str], ...] = (
    _preface,
    _explanation,
    _repeated_prompt,
    _punctuation,
    _off_task,
    _wrong_answer,
    _wrong_format,
    _chatty_wrong_format,
)

# --------------------------------------------------------------------------------------------------------
# Files


def write(
    folder: Path, *, num_prompts: int = 2400, num_held_out: int = 100, seed: int = 0, num_held_out_scored: int = 22
) -> VerifiableData:
    """Writes `instruction.jsonl`, `scored.jsonl`, `held_out.jsonl`, `held_out_scored.jsonl`, the data card `README.md`.

    Arguments and errors are those of `generate`.
    """
    data = generate(num_prompts, num_held_out, seed, num_held_out_scored)
    held_out_rows = tuple(Row(task, task.answer) for task in data.held_out_tasks)
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / "instruction.jsonl", _jsonl(data.instruction_rows))
    _write_atomically(folder / "scored.jsonl", _jsonl(data.scored_rows))
    _write_atomically(folder / "held_out.jsonl", _jsonl(held_out_rows))
    _write_atomically(folder / "held_out_scored.jsonl", _jsonl(data.held_out_scored_rows))
    _write_atomically(folder / "README.md", data_card(data, seed))
    return data


def read_tasks(path: Path) -> tuple[Task, ...]:
    """The tasks of a file that `write` made (any of the four), one a row, in order."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return tuple(_read_task(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line)


def _read_task(line: str, origin: str) -> Task:
    try:
        row = json.loads(line)
        task = Task(kind=row["meta"]["kind"], prompt=row["prompt"], answer=row["meta"]["answer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{origin}: needs a JSON object with prompt, meta.kind and meta.answer") from error
    if task.kind not in TASK_KINDS:
        raise UserError(f"{origin}: unknown kind {task.kind!r}; known: {', '.join(TASK_KINDS)}")
    return task


def _jsonl(rows: tuple[Row, ...]) -> str:
    return "".join(row.to_json() + "\n" for row in rows)


def _write_atomically(path: Path, text: str) -> None:
    """Write by a rename: a killed process leaves the old file or the new one, never a part of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    temporary.replace(path)


def data_card(data: VerifiableData, seed: int) -> str:
    """README.md: what the files hold, how scores are defined, and what they are not good for."""
    train = Counter(row.task.kind for row in data.scored_rows)
    held_out = Counter(task.kind for task in data.held_out_tasks)
    graded = Counter(task.kind for task in dict.fromkeys(row.task for row in data.held_out_scored_rows))
    scores, held_out_scores = (
        Counter(row.score for row in rows) for rows in (data.scored_rows, data.held_out_scored_rows)
    )
    kind_lines = "\n".join(f"| {kind} | {train[kind]} | {held_out[kind]} | {graded[kind]} |" for kind in TASK_KINDS)
    score_lines = "\n".join(
        f"| {score} | {why} | {scores[score]} | {held_out_scores[score]} |" for score, why in SCORE_MEANINGS.items()
    )
    return f"""# Verifiable instructions

Short English tasks whose answer code can check, made by `uft_ds.examples.verifiable` with seed {seed}.
Synthetic: drawn from word lists and templates, no text of any person or model. Licence: Apache-2.0.

* `instruction.jsonl`: {len(data.instruction_rows)} prompts with the right response, no score.
* `scored.jsonl`: the same prompts with a response, right or flawed, and its score.
* `held_out.jsonl`: {len(data.held_out_tasks)} other prompts with the right response, for evaluation.
* `held_out_scored.jsonl`: {len(data.held_out_scored_rows)} scored responses to {graded.total()} more held-out prompts.

Keys: `prompt`, `response`, `score` (scored rows), `meta` (`kind` and `answer`: enough to grade any response).

| kind | training prompts | held-out prompts | held out with scores |
|---|---|---|---|
{kind_lines}

## Scores

Each score is `grade(task, response)`, a pure function of the two:

| score | meaning | scored rows | held-out scored rows |
|---|---|---|---|
{score_lines}

## Known limits

* {len(TASK_KINDS)} kinds of template: good to show that training works and what it moves, not to make a
  model better in general.
* Held-out prompts share templates and words with the training ones; they differ in payload.
* Flaws are drawn from a list, not from a model; real mistakes are more varied.
* The grades between 0 and 1 are a convention. Chatter is not read: a lower-case answer with more words after
  it counts as the answer with chatter (0.5), whatever they say.
"""
