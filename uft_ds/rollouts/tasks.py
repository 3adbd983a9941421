"""Tasks: prompts that the policy answers greedily at each evaluation, and that a scorer grades; none is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed, UserError
from uft_ds.record.task_answers import TaskAnswer
from uft_ds.rollouts.answers import Answers, Generator, Question, Unanswered
from uft_ds.rollouts.first_rank import on_first_rank
from uft_ds.rollouts.prompts import PromptText
from uft_ds.rollouts.scorers import Score, SourceScorer

MOST_UNSCORED = 0.1
"""Share of a task's answers above which there is no mean: that of a few would be kept as the best of all steps."""


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt of a task.

    origin: `file:line`. token_ids: up to where the answer begins. text: what its scorer reads.
    """

    origin: str
    token_ids: tuple[int, ...]
    text: PromptText


@dataclass(frozen=True)
class Task:
    """A task that the run evaluates.

    max_new_tokens: of an answer. scorer: on rank 0; None on the others.
    """

    name: str
    prompts: tuple[TaskPrompt, ...]
    max_new_tokens: int
    scorer: SourceScorer | None


class TaskEvaluation:
    """Evaluates all tasks of a run; see `training.loop.Tasks`."""

    def __init__(
        self,
        engine: Engine,
        tasks: Seq[Task],
        generator_of: Callable[[int], Generator],
        decode: Callable[[Seq[int]], str],
    ) -> None:
        """
        Args:
            generator_of: makes the generator for so many new tokens, which answers by the likeliest token. It is called
                at the first evaluation, once all that takes memory is there, and by every rank.
            decode: the text of an answer's tokens, without special ones.
        """
        self._engine, self._tasks, self._decode = engine, tuple(tasks), decode
        self._generator_of = cache(generator_of)

    @property
    def num_prompts(self) -> int:
        return sum(len(task.prompts) for task in self._tasks)

    def evaluate(self, step: int, on_done: Callable[[int], None]) -> tuple[dict[str, float], list[TaskAnswer]]:
        """Answer and grade all prompts. Every rank must call it, and all get the same.

            tasks/NAME/score            mean over the answers that have a score; missing if over a tenth has none
            tasks/NAME/unscored         number of answers without one; they count for nothing
            tasks/NAME/truncated        share of the answers that were cut
            tasks/NAME/answer_tokens    mean length of an answer, in tokens

        A scorer that fails, as a judge that is gone, leaves the answers without a score: training goes on.

        Args:
            step: number of optimiser steps so far.
            on_done: called after each task with the number of prompts that are done.
        Raises:
            CheckFailed: the policy's logits are not finite. Stopped: the run is to stop.
        """
        metrics: dict[str, float] = {}
        answers: list[TaskAnswer] = []
        done = 0
        for task in self._tasks:
            given = self._generator_of(task.max_new_tokens).answer(
                [Question(prompt.token_ids, 1, 0) for prompt in task.prompts]
            )
            texts = [None if isinstance(of, Unanswered) else self._decode(of[0].token_ids) for of in given]
            scores = self._scores(task, texts, step)
            metrics |= _metrics(task.name, given, scores)
            answers += [
                _answer(step, task.name, prompt, of, text, score)
                for prompt, of, text, score in zip(task.prompts, given, texts, scores, strict=True)
            ]
            done += len(task.prompts)
            on_done(done)
        return metrics, answers

    def _scores(self, task: Task, texts: Seq[str | None], step: int) -> list[Score]:
        try:
            return on_first_rank(self._engine, f"task {task.name} {step}", lambda: _scores(task, texts))
        except (UserError, CheckFailed) as error:  # the same on every rank
            return [Score(None, reason=str(error))] * len(texts)

    def close(self) -> None:
        """End what the scorers have started."""
        for task in self._tasks:
            if task.scorer is not None:
                task.scorer.close()


def _scores(task: Task, texts: Seq[str | None]) -> list[Score]:
    assert task.scorer is not None, "rank 0 has it"
    items = [
        [] if text is None else [prompt.text.item(text, prompt.origin, number)]
        for number, (prompt, text) in enumerate(zip(task.prompts, texts, strict=True))
    ]
    return [of[0] if of else Score(None, reason="the policy gave no answer") for of in task.scorer.score(items)]


def _metrics(name: str, given: Seq[Answers], scores: Seq[Score]) -> Mapping[str, float]:
    values = [score.value for score in scores if score.value is not None]
    answers = [of[0] for of in given if not isinstance(of, Unanswered)]
    found = {"unscored": float(len(scores) - len(values))}
    if values and found["unscored"] <= MOST_UNSCORED * len(scores):
        found["score"] = fmean(values)
    if answers:
        found |= {
            "truncated": fmean(not answer.ended for answer in answers),
            "answer_tokens": fmean(len(answer.token_ids) for answer in answers),
        }
    return {f"tasks/{name}/{metric}": value for metric, value in found.items()}


def _answer(step: int, task: str, prompt: TaskPrompt, given: Answers, text: str | None, score: Score) -> TaskAnswer:
    asked = prompt.text.messages[-1].content if prompt.text.messages else ""
    ended = not isinstance(given, Unanswered) and given[0].ended
    return TaskAnswer(step, task, prompt.origin, asked, text or "", score.value, score.reason, ended)
