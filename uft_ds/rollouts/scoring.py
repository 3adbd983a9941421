"""From a generator's answers to scored groups: decode, score, and say which prompts are left out and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from uft_ds.rollouts.answers import Answer, Answers, Question, Unanswered
from uft_ds.rollouts.prompts import PromptText
from uft_ds.rollouts.record import Group, ScoredAnswer
from uft_ds.rollouts.scorers import RewardMap, Score, SourceScorer
from uft_ds.scoring.rows import written

Truncated = Literal["score", "zero", "drop"]
"""What becomes of an answer that was cut; see the recipe's `generator.truncated`."""

Prompt = tuple[int, int, str]
"""A prompt's source, its number in the source, and its place."""


def left_out_before_scoring(answers: Answers, truncated: Truncated) -> str:
    """Why the answers to a prompt need no score; empty if they do."""
    if isinstance(answers, Unanswered):
        return answers.reason
    cut = sum(not answer.ended for answer in answers)
    if cut and truncated == "drop":
        return f"{cut} of {len(answers)} answers are cut (generator.truncated: drop)"
    return ""


@dataclass(frozen=True)
class StepScoring:
    """How rank 0 scores a step.

    scorers, texts: by the number of the source; texts by the prompt's place.
    decode: the text of an answer's tokens, without special ones. tokenizer: the hash of the tokenizer.
    reward_maps: by the number of a source whose answers a reward model on the policy's base scores, on all ranks.
    """

    scorers: Mapping[int, SourceScorer]
    texts: Mapping[int, Mapping[str, PromptText]]
    decode: Callable[[Seq[int]], str]
    truncated: Truncated
    tokenizer: str
    reward_maps: Mapping[int, RewardMap] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """The identities of the scorers, by the number of the source, as text."""
        both: dict[int, SourceScorer | RewardMap] = {**self.scorers, **self.reward_maps}
        return {str(number): dict(both[number].identity()) for number in sorted(both)}

    def scored(
        self,
        prompts: Seq[Prompt],
        questions: Seq[Question],
        answers: Seq[Answers],
        rewards: Mapping[int, Seq[float]] = MappingProxyType({}),
    ) -> tuple[Group, ...]:
        """The scored groups of a step, in order.

        Args:
            rewards: by a prompt's place in the step, the value of each of its answers; see `StreamScorer`.
        Raises:
            UserError: no answer can be scored, as with a wrong key of a judge. CheckFailed: a cost limit is reached.
        """
        texts = [[] if isinstance(of, Unanswered) else [self.decode(a.token_ids) for a in of] for of in answers]
        scores = {place: self.reward_maps[prompts[place][0]].scores(values) for place, values in rewards.items()}
        for number, scorer in self.scorers.items():
            own = [
                place
                for place, (source, *_) in enumerate(prompts)
                if source == number and not left_out_before_scoring(answers[place], self.truncated)
            ]
            items = [
                [
                    self.texts[number][prompts[place][2]].item(text, f"{prompts[place][2]} answer {count}", place)
                    for count, text in enumerate(texts[place], start=1)
                ]
                for place in own
            ]
            scores |= dict(zip(own, scorer.score(items), strict=True))
        return tuple(
            self._group(prompt, question, of, texts[place], scores.get(place))
            for place, (prompt, question, of) in enumerate(zip(prompts, questions, answers, strict=True))
        )

    def close(self) -> None:
        """End what the scorers have started."""
        for scorer in self.scorers.values():
            scorer.close()

    def _group(
        self, prompt: Prompt, question: Question, answers: Answers, texts: list[str], scores: list[Score] | None
    ) -> Group:
        source, unit, origin = prompt
        left_out = left_out_before_scoring(answers, self.truncated)
        given: tuple[Answer, ...] = () if isinstance(answers, Unanswered) else answers
        of_scorer = scores or [Score(None)] * len(given)
        scored = tuple(
            self._scored(answer, text, score, seed)
            for answer, text, score, seed in zip(given, texts, of_scorer, question.seeds, strict=bool(given))
        )
        if not left_out:
            unscored = next((answer for answer in scored if answer.score is None), None)
            left_out = "" if unscored is None else f"an answer has no score ({unscored.reason})"
        messages = tuple(written(self.texts[source][origin].messages))
        return Group(source, unit, origin, question.token_ids, messages, scored, left_out, self.tokenizer)

    def _scored(self, answer: Answer, text: str, score: Score, seed: int) -> ScoredAnswer:
        value, reason = score.value, score.reason
        if self.truncated == "zero" and not answer.ended and value is not None:
            value, reason = 0.0, "cut at the longest length (generator.truncated: zero)"
        logp = None if answer.logps is None else sum(answer.logps)
        return ScoredAnswer(answer.token_ids, answer.ended, text, value, score.raw, score.reply, reason, seed, logp)
