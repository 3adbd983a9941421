"""The scorers of online sources: made from a recipe, and asked for the scores of whole groups of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.recipe.settings import JudgeSettings, ScorerSettings
from uft_ds.scoring.build import JudgeOptions, Limits, default_rule, scorer_of
from uft_ds.scoring.code import CodeScorer
from uft_ds.scoring.item import Item, Judgement, Scorer, found, scorer_name
from uft_ds.scoring.mapping import Map, check_rule, map_named, rule_identity
from uft_ds.scoring.reward import checked_tokenizer


@dataclass(frozen=True)
class Score:
    """The score of one answer.

    value: from 0 to 1; None: there is none, and `reason` says why. raw, reply: the scorer's own value and words.
    """

    value: float | None
    raw: float | None = None
    reply: str = ""
    reason: str = ""


class SourceScorer:
    """Scores the answers to one source's prompts."""

    def __init__(self, settings: ScorerSettings, key: str, stop: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            key: the recipe's key of it, for messages.
            stop: called before each batch of answers; raises Stopped if the run is to stop.
        Raises:
            UserError: names the key.
        """
        judge = JudgeOptions() if settings.judge is None else _judge_options(settings.judge)
        with _named(key):
            self._scorer: Scorer = scorer_of(
                settings.by,
                judge=judge,
                workers=settings.workers,
                seconds=settings.seconds,
            )
            name = scorer_name(self._scorer.identity())
            rule = settings.rule or default_rule(settings.by, judge)
            check_rule(rule, name)
            self._map: Map = map_named(rule, (), name)
            self._identity = {"scorer": dict(self._scorer.identity()), "map": rule_identity(rule, name)}
        self._key, self._stop = key, stop

    def identity(self) -> Mapping[str, Any]:
        """All that its scores depend on besides the answers, as plain JSON values."""
        return self._identity

    def score(self, groups: Seq[Seq[Item]]) -> list[list[Score]]:
        """The scores of the answers to some prompts, in order.

        Raises:
            UserError: no answer can be scored, as with a wrong key of a judge. CheckFailed: its cost limit is reached.
        """
        done: list[Judgement] = []
        with _named(self._key):
            for batch in _batches(groups, self._scorer.batch_items):
                self._stop()
                done += self._scorer.score(batch)
        judged = iter(done)
        return [[scored(next(judged), self._map) for _ in group] for group in groups]

    def start(self) -> None:
        """Start what it needs, so that what cannot be used is found before there are answers.

        Raises:
            UserError: names the key.
        """
        if isinstance(self._scorer, CodeScorer):
            with _named(self._key):
                self._scorer.start()

    def close(self) -> None:
        """End what it has started."""
        self._scorer.close()


def check_scorer(settings: ScorerSettings, key: str) -> None:
    """Refuse, before a launch, a scorer that cannot be made or started. No model is loaded: it would fill the GPU here.

    Args:
        key: as for `SourceScorer`.
    Raises:
        UserError: names the key.
    """
    kind, _, target = settings.by.partition(":")
    if kind == "reward":
        with _named(key):
            checked_tokenizer(Path(target))
            assert settings.rule is not None, "a recipe without it has been refused"
            check_rule(settings.rule, f"reward:{Path(target).name}")
        return
    scorer = SourceScorer(settings, key)
    try:
        scorer.start()
    finally:
        scorer.close()


class RewardMap:
    """Turns the values of a reward model on the policy's base into the scores of one source; see `StreamScorer`."""

    def __init__(self, identity: Mapping[str, Any], rule: str, key: str) -> None:
        """
        Args:
            identity: of the reward model. rule: the recipe's `map`. key: the recipe's key, for messages.
        Raises:
            UserError: names the key.
        """
        name = scorer_name(identity)
        with _named(key):
            check_rule(rule, name)
            self._map: Map = map_named(rule, (), name)
            self._identity = {"scorer": dict(identity), "map": rule_identity(rule, name)}

    def identity(self) -> Mapping[str, Any]:
        """All that its scores depend on besides the answers and the base, as plain JSON values."""
        return self._identity

    def scores(self, values: Seq[float]) -> list[Score]:
        """The scores of the answers to one prompt, in order. values: of the reward model."""
        return [scored(found(value), self._map) for value in values]


def scored(judgement: Judgement, map_of: Map) -> Score:
    """The score that a map makes of a judgement, or the reason why there is none."""
    if judgement.value is None:
        return Score(None, reply=judgement.reply, reason=judgement.reason)
    try:
        return Score(map_of(judgement.value), judgement.value, judgement.reply)
    except ValueError as error:
        return Score(None, judgement.value, judgement.reply, str(error))


def _batches(groups: Seq[Seq[Item]], size: int) -> Iterator[list[Item]]:
    """Items of whole groups, about `size` at once."""
    held: list[Item] = []
    for group in groups:
        held += group
        if len(held) >= size:
            yield held
            held = []
    if held:
        yield held


_KEYS = {
    "--judge-url": "judge.url",
    "--judge-model": "judge.model",
    "--judge-key-env": "judge.key_env",
    "--judge-body": "judge.body",
    "--template": "judge.question",
    "--scale": "judge.scale",
    "--requests-per-minute": "judge.requests_per_minute",
    "--max-cost": "judge.max_cost",
    "--price": "judge.price",
    "--map": "map",
}
"""The keys of a recipe in place of the options of `uft score`, which the scorers' own messages name."""


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Within the block, errors for the user begin with the recipe's key."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix("--by ")
        for option, name in _KEYS.items():
            text = text.replace(option, f"{key}.{name}")
        text = text.replace("--by", key)  # not its `by`: score_by may be the text alone
        raise UserError(text if text.startswith(key) else f"{key}: {text}") from None


def _judge_options(judge: JudgeSettings) -> JudgeOptions:
    return JudgeOptions(
        url=judge.url,
        model=judge.model,
        key_env=judge.key_env,
        template=None if judge.question is None else Path(judge.question),
        scale=judge.scale,
        body=judge.body,
        limits=Limits(
            requests_per_minute=judge.requests_per_minute,
            concurrency=judge.concurrency,
            seconds=judge.timeout_seconds,
            tries=judge.tries,
            max_cost=judge.max_cost,
            price=judge.price,
        ),
    )
