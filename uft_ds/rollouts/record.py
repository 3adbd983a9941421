"""The record of an online run: what was generated and scored, written whole before a step trains on it.

    rollouts/answers/000012.jsonl    one prompt a line, with its answers, their tokens and their scores
    rollouts/steps/000012.json       which policy answered, how, and the hash of that file; written last

A step is named by the number that it has in the metrics. A step without the second file has not been recorded. Nothing
here is ever deleted: the record of a step that is generated anew is put aside under another name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from uft_ds.errors import UserError
from uft_ds.host.files import sha256, write_atomically
from uft_ds.host.formats import KEY, check_format

FORMAT = 1
ANSWERS, STEPS = "answers", "steps"
_HASH = "answers_sha256"
_REMEDY = "bring both files of the step back from a copy of the run, or delete both and let the step be generated anew"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer, and what the scorer said of it.

    ids: its tokens, with the stop token at the end if it has ended by itself.
    text: as the scorer read it. score: from 0 to 1; None: it could not be scored, and `reason` says why.
    raw, reply: the scorer's own value and words. seed: with which it was drawn.
    logp: nats, summed over tokens, by the generator; None if it does not say.
    """

    ids: tuple[int, ...]
    ended: bool
    text: str
    score: float | None
    raw: float | None = None
    reply: str = ""
    reason: str = ""
    seed: int = 0
    logp: float | None = None


@dataclass(frozen=True)
class Group:
    """A prompt and its answers.

    source, unit: the training source, and the prompt's number among those that the run uses of it.
    messages: the prompt as turns, for readers of the record. left_out: why no answer is trained on; empty if they are.
    tokenizer: the hash of the tokenizer and template that the tokens are of.
    """

    source: int
    unit: int
    origin: str
    prompt_ids: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]
    answers: tuple[ScoredAnswer, ...]
    left_out: str = ""
    tokenizer: str = ""


@dataclass(frozen=True)
class StepRecord:
    """Everything that a step trains on, and where it came from.

    number: of the step, as in the metrics: 1 for the first one.
    policy: SHA-256 of the adapter that answered, hex.
    generator, scorers: their identities; scorers by the number of the source.
    seconds: how long generation and scoring took, by name.
    """

    number: int
    policy: str
    generator: Mapping[str, Any]
    scorers: Mapping[str, Any]
    groups: tuple[Group, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordFolder:
    """The folder of a run's record."""

    path: Path

    def answers_file(self, number: int) -> Path:
        return self.path / ANSWERS / f"{number:06d}.jsonl"

    def step_file(self, number: int) -> Path:
        return self.path / STEPS / f"{number:06d}.json"

    def write(self, record: StepRecord) -> None:
        """Write the record of a step. A record that is there already is put aside, under the hash of its policy.

        Raises:
            OSError: the folder cannot be written.
        """
        answers, step = self.answers_file(record.number), self.step_file(record.number)
        for file in (answers, step):
            file.parent.mkdir(parents=True, exist_ok=True)
        self._put_aside(record.number)
        write_atomically(answers, (_line(group) for group in record.groups))
        head = {name: getattr(record, name) for name in ("policy", "generator", "scorers", "seconds")}
        content = {KEY: FORMAT, "number": record.number, **head, _HASH: sha256(answers)}
        write_atomically(step, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def read(self, number: int) -> StepRecord | None:
        """The record of a step; None if it was not recorded, or not to the end.

        Raises:
            UserError: a file is damaged, or of a newer version.
        """
        step = self.step_file(number)
        if not step.exists():
            return None
        content = _read_step(step)
        answers = self.answers_file(number)
        try:
            raw = answers.read_bytes()
        except OSError as error:
            raise UserError(f"{answers}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if hashlib.sha256(raw).hexdigest() != content[_HASH]:
            raise UserError(f"{answers}: its content is not what {step.name} was written for; {_REMEDY}")
        lines = raw.decode().split("\n")[:-1]  # not `splitlines`: texts may hold other line ends, such as U+2028
        groups = tuple(_group(line, f"{answers}:{place}") for place, line in enumerate(lines, start=1))
        return StepRecord(
            number, content["policy"], content["generator"], content["scorers"], groups, content["seconds"]
        )

    def scorers_before(self, number: int) -> Mapping[str, Any]:
        """The identities of the scorers at the newest recorded step before `number`; empty if there is none.

        Raises:
            UserError: the step's file cannot be read.
        """
        before = [recorded for recorded in self.numbers() if recorded < number]
        scorers: Mapping[str, Any] = _read_step(self.step_file(before[-1]))["scorers"] if before else {}
        return scorers

    def numbers(self) -> list[int]:
        """The numbers of all recorded steps, in order."""
        return sorted(int(file.stem) for file in (self.path / STEPS).glob("*.json") if file.stem.isdigit())

    def refuse(self, number: int, reason: str) -> None:
        """Put the record of a step aside that must not be trained on again, and write down why."""
        self._put_aside(number, reason)

    def _put_aside(self, number: int, reason: str = "") -> None:
        step = self.step_file(number)
        if not step.exists():
            return
        mark = _read_step(step)["policy"][:8]
        names = (f"{number:06d}.{mark}" + (f".{count}" if count else "") for count in range(10**6))
        name = next(name for name in names if not (step.parent / f"{name}.json").exists())
        # The step's file first: without it the answers count for nothing.
        step.rename(step.parent / f"{name}.json")
        answers = self.answers_file(number)
        if answers.exists():
            # Not .jsonl: whoever reads the folder as data would train on what the run did not train on.
            answers.rename(answers.parent / f"{name}.jsonl.aside")
        if reason:
            write_atomically(step.parent / f"{name}.txt", reason + "\n")


def _line(group: Group) -> str:
    # Half of a surrogate pair, which a judge's reply may hold, stays an escape: UTF-8 cannot hold it.
    text = json.dumps(asdict(group), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _group(line: str, place: str) -> Group:
    try:
        values = json.loads(line)
        answers = tuple(_made(ScoredAnswer, answer, "ids") for answer in values["answers"])
        group = _made(Group, values | {"answers": answers}, "prompt_ids", "messages")
        _check_values(group)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: not a prompt with its answers ({error!r}); {_REMEDY}") from None
    return group


def _check_values(group: Group) -> None:
    """
    Raises:
        ValueError: tokens that are none, an answer without any, or a score outside [0, 1].
    """
    for ids in (group.prompt_ids, *(answer.ids for answer in group.answers)):
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError("expected token ids, at least one")
    for answer in group.answers:
        if answer.score is None and not group.left_out:
            raise ValueError("an answer without a score in a prompt that is not left out")
        if answer.score is not None and not 0.0 <= answer.score <= 1.0:
            raise ValueError(f"a score of {answer.score!r}, expected a number from 0 to 1")


def _made(kind: type[_Value], values: dict[str, Any], *tuples: str) -> _Value:
    """A value of a dataclass, of whose fields the named ones are tuples. A newer version's fields are left out."""
    known = {name.name for name in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: tuple(value) if key in tuples else value for key, value in values.items() if key in known})


def _read_step(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content.get(KEY), FORMAT, _REMEDY)
        texts = all(isinstance(content[key], str) for key in ("policy", _HASH))
        maps = all(isinstance(content[key], dict) for key in ("generator", "scorers", "seconds"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); {_REMEDY}") from None
    if not (texts and maps):
        raise UserError(f"{path}: expected policy, generator, scorers and {_HASH}; {_REMEDY}")
    return content
