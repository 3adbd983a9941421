"""`uft generate`: a model's answers to all questions of a benchmark, in the layout that the benchmark's tools read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks import alpaca_eval, mt_bench
from uft_ds.evaluation.benchmarks.answering import Plan, answered, batches_of
from uft_ds.evaluation.benchmarks.lengths import Lengths, lengths_of
from uft_ds.evaluation.benchmarks.question import Benchmark, Question
from uft_ds.evaluation.benchmarks.work import Work
from uft_ds.evaluation.models import Subject
from uft_ds.host.files import sha256


@dataclass(frozen=True)
class GenerationInputs:
    """What is asked, and how. temperature, max_new_tokens: None: the benchmark's own. limit: the first questions."""

    benchmark: Benchmark
    questions: Path
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    batch_size: int = 16
    limit: int | None = None

    def read(self) -> list[Question]:
        """Raises UserError: names file and line."""
        read = mt_bench.read_questions if self.benchmark == "mt_bench" else alpaca_eval.read_questions
        return read(self.questions)[: self.limit]

    @property
    def plan(self) -> Plan:
        default = mt_bench.MAX_NEW_TOKENS if self.benchmark == "mt_bench" else alpaca_eval.MAX_NEW_TOKENS
        return Plan(self._temperature_of, self.max_new_tokens or default, self.seed, self.batch_size)

    def temperatures(self, questions: Sequence[Question]) -> dict[str, float]:
        """The temperature of each category, or of `all` where it is one."""
        found = {question.category: self._temperature_of(question) for question in questions}
        return found if len(set(found.values())) > 1 else {"all": next(iter(found.values()))}

    def _temperature_of(self, question: Question) -> float:
        if self.temperature is not None:
            return self.temperature
        if self.benchmark == "mt_bench":
            return mt_bench.TEMPERATURES.get(question.category, mt_bench.OTHER_TEMPERATURE)
        return alpaca_eval.TEMPERATURE


@dataclass(frozen=True)
class Made:
    """How it ended. was_complete: whether it had been before. new: questions that were answered now."""

    lengths: Lengths
    was_complete: bool
    new: int


def make_answers(
    asked: GenerationInputs,
    questions: Sequence[Question],
    subject: Subject,
    out: Path,
    *,
    name: str,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Made:
    """Answer all questions and write the answers; what an earlier process has answered stays.

    Args:
        name: of the model in the output.
        on_progress: called with the number of questions that have been answered, and of all.
    Raises:
        UserError: the output is of other settings, or a question is too long for the model.
        CheckFailed: logits are not finite.
    """
    plan, work = asked.plan, Work(out)
    if out.resolve() == asked.questions.resolve():
        raise UserError(f"--out {out}: is the file of questions; choose another name")
    batches = batches_of(subject, questions, plan)
    with work.taken(settings_of(asked, questions, subject, name), overwrite=overwrite):
        lengths = work.complete()
        if lengths is not None:
            return Made(lengths, was_complete=True, new=0)
        found = {answer.key: answer for answer in work.answers()}
        begun = len(found)
        on_progress(begun, len(questions))
        for batch in answered(subject, batches, plan, done=set(found)):
            work.add(batch)
            found |= {answer.key: answer for answer in batch}
            on_progress(len(found), len(questions))
        answers = [found[question.key] for question in questions]
        if asked.benchmark == "mt_bench":
            work.finish(mt_bench.answer_lines(answers, name, work.began), lengths_of(answers))
        else:
            work.finish(alpaca_eval.outputs_text(questions, answers, name), lengths_of(answers))
        return Made(lengths_of(answers), was_complete=False, new=len(found) - begun)


def settings_of(
    asked: GenerationInputs, questions: Sequence[Question], subject: Subject, name: str
) -> Mapping[str, Any]:
    """All that the output depends on."""
    plan = asked.plan
    return {
        "benchmark": asked.benchmark,
        "questions": {"sha256": sha256(asked.questions), "count": len(questions)},
        "name": name,
        "model": dict(subject.identity),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": subject.model.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "temperature": asked.temperatures(questions),
        "top_p": 1.0,
        "seed": plan.seed,
        "max_new_tokens": plan.max_new_tokens,
        "batch_size": plan.batch_size,
    }
