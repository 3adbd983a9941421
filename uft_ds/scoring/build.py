"""The scorer that `--by` names, from plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text, user_cache
from uft_ds.host.web import key_in
from uft_ds.scoring.asking import Judge
from uft_ds.scoring.code import CodeScorer
from uft_ds.scoring.endpoint import Endpoint
from uft_ds.scoring.item import Scorer
from uft_ds.scoring.judge import JudgeScorer, Rubric
from uft_ds.scoring.length import LengthScorer
from uft_ds.scoring.mapping import shortest
from uft_ds.scoring.pacing import Budget
from uft_ds.scoring.questions import COMPARE, GRADE, Template
from uft_ds.scoring.replies import Replies
from uft_ds.scoring.reward import RewardScorer

SCORERS = "code:package.module:function, regex:PATTERN, length, judge or reward:FOLDER"


@dataclass(frozen=True)
class Limits:
    """How much a judge may be asked. price: of a million prompt tokens and of a million completion tokens."""

    requests_per_minute: float | None = None
    concurrency: int = 8
    seconds: float = 120.0
    tries: int = 6
    max_tokens: int | None = None
    max_cost: float | None = None
    price: tuple[float, float] | None = None

    def budget(self) -> Budget:
        """Raises UserError: a limit on cost without a price."""
        if self.max_cost is not None and self.price is None:
            raise UserError("--max-cost: needs --price PROMPT,COMPLETION, what a million tokens of each cost")
        prompt, completion = self.price or (0.0, 0.0)
        return Budget(
            max_tokens=self.max_tokens, max_cost=self.max_cost, prompt_price=prompt, completion_price=completion
        )


@dataclass(frozen=True)
class JudgeOptions:
    """What a judge is and is asked. body: further fields of a request; null leaves one out."""

    url: str | None = None
    model: str | None = None
    key_env: str | None = None
    template: Path | None = None
    pairwise: bool = False
    scale: tuple[float, float] = (1.0, 10.0)
    body: str | None = None
    cache: Path | None = None
    limits: Limits = field(default_factory=Limits)


_OPTIONS = {
    "url": "--judge-url",
    "model": "--judge-model",
    "key_env": "--judge-key-env",
    "template": "--template",
    "pairwise": "--pairwise",
    "scale": "--scale",
    "body": "--judge-body",
    "cache": "--cache",
}
_LIMITS = {
    "requests_per_minute": "--requests-per-minute",
    "concurrency": "--concurrency",
    "seconds": "--timeout",
    "tries": "--tries",
    "max_tokens": "--max-tokens-spent",
    "max_cost": "--max-cost",
    "price": "--price",
}


def judge_of(options: JudgeOptions, environ: Mapping[str, str] = os.environ) -> JudgeScorer:
    """A judge that scores.

    Raises:
        UserError: names the option.
    """
    judge = asked_judge(options, environ)
    if options.template is None:
        template = Template(COMPARE if options.pairwise else GRADE, "the built-in template", compares=options.pairwise)
    else:
        template = Template(_text(options.template), str(options.template), compares=options.pairwise)
    low, high = options.scale
    if low >= high:
        raise UserError(f"--scale {low:g},{high:g}: expected the worst grade first, then the best")
    return JudgeScorer(judge, Rubric(template, options.scale))


def asked_judge(options: JudgeOptions, environ: Mapping[str, str] = os.environ, *, max_tokens: int = 1024) -> Judge:
    """A judge that may be asked anything.

    Args:
        max_tokens: of a reply, where the options' body does not say.
    Raises:
        UserError: names the option.
    """
    if not options.url or not options.model:
        missing = "--judge-url" if not options.url else "--judge-model"
        raise UserError(f"--by judge: needs {missing}; such as --judge-url http://127.0.0.1:8000/v1 --judge-model NAME")
    try:
        options.model.encode()
    except UnicodeEncodeError:  # the output, which names the judge, could not be written in the end
        raise UserError(f"--judge-model: found {options.model!r}, expected a name in UTF-8") from None
    key = key_in(options.key_env, "--judge-key-env", environ)
    body = {"model": options.model, "temperature": 0, "max_tokens": max_tokens, **_body(options.body)}
    limits = options.limits
    return Judge(
        Endpoint(options.url, body, key, limits.seconds, limits.tries),
        Replies(options.cache or user_cache() / "judge"),
        limits.budget(),
        requests_per_minute=limits.requests_per_minute,
        concurrency=limits.concurrency,
    )


def scorer_of(
    by: str,
    *,
    judge: JudgeOptions,
    seconds: float = 10.0,
    workers: int | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
) -> Scorer:
    """The scorer of `--by`.

    Args:
        seconds, workers: of `code` and `regex`: the limit for an item, and the number of processes.
        tokenizer: of `length`. dtype, max_length: of `reward`.
    Raises:
        UserError: names the option.
    """
    kind, _, argument = by.partition(":")
    if kind != "judge" and judge != JudgeOptions():
        raise UserError(f"--by {by}: {', '.join(_given(judge))}: options that go with --by judge")
    if kind != "length" and tokenizer is not None:
        raise UserError(f"--by {by}: --tokenizer goes with --by length")
    if kind != "reward" and (dtype is not None or max_length is not None):
        raise UserError(f"--by {by}: --dtype and --max-length go with --by reward:FOLDER")
    if kind in ("code", "regex") and argument:
        return CodeScorer(kind, argument, seconds=seconds, workers=workers or len(os.sched_getaffinity(0)))
    if by == "length":
        return LengthScorer(tokenizer)
    if by == "judge":
        return judge_of(judge)
    if kind == "reward" and argument:
        return RewardScorer(Path(argument), dtype=dtype, max_length=max_length)
    raise UserError(f"--by: found {by!r}, expected {SCORERS}")


def _given(judge: JudgeOptions) -> list[str]:
    """The options that are not what they are when they are left out."""
    unset = JudgeOptions()
    values = [(name, judge, unset) for name in _OPTIONS] + [(name, judge.limits, unset.limits) for name in _LIMITS]
    names = _OPTIONS | _LIMITS
    return [names[name] for name, given, default in values if getattr(given, name) != getattr(default, name)]


def default_rule(by: str, judge: JudgeOptions) -> str:
    """The map from raw values where `--map` is not given.

    Raises:
        UserError: the values of this scorer have no scale of their own.
    """
    kind = by.partition(":")[0]
    if kind == "judge" and not judge.pairwise:
        low, high = judge.scale
        return f"affine:{shortest(low)},{shortest(high)}"
    if kind in ("length", "reward"):
        unit = "a length" if kind == "length" else "a reward"
        raise UserError(
            f"--by {kind}: needs --map, because {unit} has no scale of its own: affine:LOW,HIGH, quantile"
            f"{', sigmoid' if kind == 'reward' else ''} or isotonic:FILE"
        )
    return "affine:0,1"


def _body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--judge-body: found {text[:60]!r}, expected a JSON object ({error})") from None
    if not isinstance(value, dict) or {"messages", "stream", "n"} & value.keys():
        raise UserError("--judge-body: expected a JSON object without `messages`, `stream` and `n`")
    for name in ("max_tokens", "max_completion_tokens"):
        longest = value.get(name)
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
            raise UserError(f"--judge-body: {name}: found {longest!r}, expected a number of tokens, or null")
    if not isinstance(value.get("model", ""), str):
        raise UserError(f"--judge-body: model: found {value['model']!r}, expected a name; --judge-model gives it")
    return value


def _text(path: Path) -> str:
    try:
        return read_regular_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {path}: cannot be read ({error})") from None
