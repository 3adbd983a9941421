"""The sections of a recipe that online sources read, and the combinations of keys that they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from uft_ds.data.formats.table import PROMPTS
from uft_ds.recipe.section import (
    FiniteFloat,
    Location,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    UnitInterval,
)

if TYPE_CHECKING:
    from uft_ds.recipe.schema import SourceSection
    from uft_ds.recipe.settings import GeneratorSettings

Problem = tuple[str, str]
"""(key, the problem)"""


class JudgeSection(Section):
    url: str
    """Base address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."""
    model: str
    """The judge's name at the endpoint."""
    key_env: str | None = None
    """Environment variable that holds the endpoint's key."""
    question: Location | None = None
    """A file with the question to the judge, as for `--template`; null: the built-in one."""
    scale: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] = [1.0, 10.0]
    """[worst, best] grade."""
    body: str | None = None
    """Further fields of a request, as a JSON object."""
    requests_per_minute: PositiveFloat | None = None
    """Limit of the endpoint; null: none."""
    concurrency: Positive = 8
    """Number of requests at one time."""
    timeout_seconds: PositiveFloat = 120.0
    """Limit for one request."""
    tries: Positive = 6
    """Number of times that a request is made before its answer counts as not scored."""
    max_cost: PositiveFloat | None = None
    """The run ends before it spends more in one process; needs price."""
    price: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)] | None = None
    """[prompt, completion]: what a million tokens of each cost."""


class ScoreBySection(Section):
    by: str
    """code:package.module:function, regex:PATTERN, length, judge, or reward:FOLDER, as for `uft score`. FOLDER may also
    be a run that trained a reward model on the policy's own base, or its adapter: no second base is loaded then."""
    map: str | None = None
    """How raw values become scores from 0 to 1: sigmoid, affine:LOW,HIGH or isotonic:FILE; null: code and regex give
    scores themselves, a judge's grades follow its scale."""
    seconds: PositiveFloat = 10.0
    """Time limit of code for one answer."""
    workers: Positive | None = None
    """Number of processes that run code; null: one per core."""
    judge: JudgeSection | None = None
    """The endpoint, for `by: judge`."""


def scored_by(value: Any) -> Any:
    """A text stands for a scorer with the defaults."""
    return {"by": value} if isinstance(value, str) else value


class GeneratorSection(Section):
    by: Literal["builtin", "vllm", "recorded"] = "builtin"
    """What answers the prompts of online sources. builtin: the ranks themselves. vllm: a server, to which each step's
    adapter is handed over. recorded: the answers and scores that another run has recorded (`uft train --replay`)."""
    url: str | None = None
    """Address of the vLLM server, such as http://127.0.0.1:8000. A resumed run may change it."""
    served_model: str | None = None
    """The base's name at the server; null: the one model that it has. A resumed run may change it."""
    key_env: str | None = None
    """Environment variable that holds the server's key, if it was started with one."""
    run: Location | None = None
    """The run whose record is trained on, for `by: recorded`."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it. The loss is that of answers drawn from the policy itself, at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Answers are drawn from the most probable tokens that together have this probability; 1: from all."""
    max_new_tokens: Positive = 512
    """Largest number of tokens of an answer. A prompt must leave room for it within data.max_length."""
    truncated: Literal["score", "zero", "drop"] = "score"
    """What becomes of an answer that is cut at max_new_tokens. score: it is scored as it is. zero: its score is 0.
    drop: all answers to its prompt are left out."""
    max_dropped: UnitInterval = 0.1
    """Largest share of a step's prompts that may have to be left out, because an answer or a score is missing; one
    prompt always may."""
    max_kl: PositiveFloat | None = None
    """The run ends after a step whose answers are further from the reference: the mean log-ratio of an answer, nats. It
    ends as a run whose last step is done. A resumed run may change it."""
    tokens_at_once: Positive = 65536
    """Largest number of tokens, prompts and answers, that a rank generates at once, for `by: builtin` and for
    evaluate.tasks."""
    concurrency: Positive = 64
    """Number of requests to the server at one time, for `by: vllm`."""
    timeout_seconds: PositiveFloat = 600.0
    """Limit for one answer, for `by: vllm`; it is asked for once again."""
    patience_minutes: PositiveFloat = 30.0
    """How long a server that cannot be reached is waited for, before the run saves its last step and ends."""


_ONLY_BY = {
    "builtin": ("tokens_at_once",),
    "vllm": ("concurrency", "timeout_seconds", "patience_minutes"),
}
"""Keys that one generator alone reads."""


def unused_of_generator(generator: GeneratorSettings) -> Iterator[str]:
    """One message for each key that is given and not read; a recipe may hold them for another generator."""
    for by, keys in _ONLY_BY.items():
        for key in keys:
            given = getattr(generator, key)
            if by != generator.by and given != GeneratorSection.model_fields[key].default:
                yield f"generator.{key}: {given:g} given, but only by: {by} reads it"


_FEW_TOKENS = 8
"""The shortest prompt that an online source must be able to hold, in tokens."""


def online_problems(
    sources: Sequence[SourceSection],
    held_out: Sequence[SourceSection],
    generator: GeneratorSection,
    *,
    max_length: int,
    reward: str,
    has_tasks: bool,
) -> Iterator[Problem]:
    """(key, problem) for every fault of online sources and their generator.

    Args:
        reward: the recipe's `objective.reward`.
        has_tasks: whether the recipe has `evaluate.tasks`, whose prompts the ranks answer, too.
    """
    is_online = any(source.format == PROMPTS for source in sources)
    for number, source in enumerate(sources):
        yield from ((f"data.sources.{number}.{key}", problem) for key, problem in _of_source(source, generator))
    for number, source in enumerate(held_out):
        if source.format == PROMPTS:
            yield (
                f"data.held_out.{number}.format",
                f"{PROMPTS!r} given, which has no responses to evaluate; give held-out data with responses, and "
                "train.samples to read the policy's answers to its prompts",
            )
    if not is_online:
        default = GeneratorSection()
        given = [name for name in GeneratorSection.model_fields if getattr(generator, name) != getattr(default, name)]
        for name in given:
            if name == "tokens_at_once" and has_tasks:
                continue
            yield f"generator.{name}", f"{getattr(generator, name)} given, but no source has format: {PROMPTS}"
        return
    if reward == "head":
        yield (
            "objective.reward",
            f"head given, but format: {PROMPTS} lets the policy answer; a reward model answers none",
        )
    yield from ((f"generator.{key}", problem) for key, problem in _of_generator(generator))
    if generator.max_new_tokens > max_length - _FEW_TOKENS:
        yield (
            "generator.max_new_tokens",
            f"{generator.max_new_tokens} leaves no room for a prompt within data.max_length {max_length}; lower it, or "
            "raise data.max_length",
        )


def _of_source(source: SourceSection, generator: GeneratorSection) -> Iterator[Problem]:
    if source.format != PROMPTS:
        for key in ("answers", "score_by"):
            if getattr(source, key) is not None:
                yield key, f"given, but only format: {PROMPTS} has prompts that the policy answers"
        return
    if source.answers is None:
        yield "answers", f"not given; format: {PROMPTS} needs it: how often each prompt is asked, such as 4"
    scorer = source.score_by
    if scorer is None and generator.by != "recorded":
        yield (
            "score_by",
            f"not given; format: {PROMPTS} needs it: what scores the answers, such as code:module:function",
        )
    if scorer is not None:
        yield from scorer_problems(scorer)
    for key, default in (
        ("score", None),
        ("score_range", None),
        ("score_map", None),
        ("pairs", "keep"),
        ("allow_one_score", False),
        ("mixed_kinds", False),
    ):
        if getattr(source, key) != default:
            yield key, f"given, but format: {PROMPTS} has no responses; score_by scores those of the policy"


def scorer_problems(scorer: ScoreBySection) -> Iterator[Problem]:
    """(key, problem) for every fault of a scorer that the recipe alone shows."""
    kind = scorer.by.partition(":")[0]
    if (kind == "judge") != (scorer.judge is not None):
        given = "not given; by: judge needs its url and model" if kind == "judge" else f"given, but by is {scorer.by!r}"
        yield "score_by.judge", given
    if scorer.map is None and kind in ("length", "reward"):
        what = "a length" if kind == "length" else "a reward"
        yield (
            "score_by.map",
            f"not given; {what} has no scale of its own: sigmoid, affine:LOW,HIGH or isotonic:FILE",
        )
    if scorer.map == "quantile":
        yield "score_by.map", "quantile compares all values with each other, and online not all are known; take another"


def _of_generator(generator: GeneratorSection) -> Iterator[Problem]:
    if (generator.by == "vllm") != (generator.url is not None):
        given = "not given; by: vllm needs it" if generator.by == "vllm" else f"given, but by is {generator.by!r}"
        yield "url", given
    for key in ("served_model", "key_env"):
        if getattr(generator, key) is not None and generator.by != "vllm":
            yield key, f"given, but by is {generator.by!r}"
    is_recorded = generator.by == "recorded"
    if is_recorded != (generator.run is not None):
        yield "run", "not given; by: recorded needs it" if is_recorded else f"given, but by is {generator.by!r}"
