"""Answers of the policy to a few held-out prompts, while it is trained. They change nothing of the training."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from uft_ds.architectures.facts import most_positions
from uft_ds.data.example import Kind
from uft_ds.data.pool import Pool
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.engine.engine import Engine
from uft_ds.errors import UserError
from uft_ds.evaluation.decoding import Decoding, Row
from uft_ds.evaluation.generate import decode, stop_token_ids, until_stop
from uft_ds.evaluation.on_ranks import answers_on_ranks, policy_generates
from uft_ds.host.signals import NEVER, Stop
from uft_ds.recipe.settings import TrainSettings
from uft_ds.record.samples import Sample
from uft_ds.streams.policy import base_of


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, and the response that the data gives to it; token ids of both."""

    token_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    origin: str
    kind: Kind
    score: float


@dataclass(frozen=True)
class Sampler:
    """What is answered, and how.

    max_new_tokens: of an answer. tokens_per_batch: most tokens, prompts and answers, that a rank holds at once.
    """

    prompts: tuple[Prompt, ...]
    chat: ChatTokenizer
    max_new_tokens: int
    tokens_per_batch: int


def choose_prompts(pools: Seq[Pool], count: int, longest: int | None) -> tuple[Prompt, ...]:
    """At most `count` different prompts, from all pools in turn, in the order of their units.

    Of a conversation it is the first prompt, of a pair the one of both sides, with the chosen response.

    Args:
        longest: most tokens of a prompt; None: any number.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    in_turn = zip_longest(*(map(pool.unit, range(len(pool))) for pool in pools))
    for sequence, *_ in (unit for units in in_turn for unit in units if unit is not None):
        if len(found) == count:
            break
        ids, (response, *_) = sequence.token_ids_T.tolist(), sequence.responses
        if longest is None or response.start <= longest:
            prompt = tuple(ids[: response.start])
            answer = tuple(ids[response.start : response.end])
            found.setdefault(prompt, Prompt(prompt, answer, response.origin, response.kind, response.score))
    return tuple(found.values())


def check_samples(settings: TrainSettings, config: Any, prompts: Seq[Prompt]) -> None:
    """Refuse settings by which no prompt can be answered.

    Args:
        config: of the base.
        prompts: as chosen by `choose_prompts` with `longest_prompt`.
    Raises:
        UserError: no held-out prompt leaves enough positions of the model for an answer.
    """
    if settings.samples and not prompts:
        raise UserError(
            f"train.sample_tokens: {settings.sample_tokens} given, but no held-out prompt leaves that many of the "
            f"{most_positions(config)} positions of the model; lower it, or set train.samples: 0"
        )


def longest_prompt(settings: TrainSettings, config: Any) -> int | None:
    """The most tokens that a prompt may have, so that its answer fits; None: the base has no limit of positions."""
    limit = most_positions(config)
    return None if limit is None else limit - settings.sample_tokens


def sample(
    engine: Engine, sampler: Sampler, step: int, stop: Stop = NEVER, on_done: Callable[[int], None] = lambda done: None
) -> list[Sample]:
    """The policy's greedy answers to all prompts, on every rank. Every rank must call it.

    Each rank answers its share, by Hugging Face's `generate` with a cache of keys and values. Under ZeRO-3 the layers
    are gathered again for each new token, so all ranks take as many tokens as the longest answer of any of them.

    Args:
        step: number of optimiser steps so far.
        on_done: called with the number of prompts that have been answered.
    Raises:
        Stopped: between two batches.
    """
    model = base_of(engine.module.policy)
    stop_ids, tokenizer = stop_token_ids(model, sampler.chat.tokenizer), sampler.chat.tokenizer
    how = Decoding(sampler.max_new_tokens, tuple(stop_ids), pad_id=stop_ids[0])
    rows = [Row(prompt.token_ids) for prompt in sampler.prompts]
    with policy_generates(engine, how):
        answered = answers_on_ranks(
            engine,
            rows,
            how,
            tokens_per_batch=sampler.tokens_per_batch,
            continues_caches=False,
            stop=stop.check,
            on_done=on_done,
        )

    def text(ids: Seq[int]) -> str:
        return decode(tokenizer, list(ids)).strip()

    return [
        Sample(
            step,
            prompt.origin,
            prompt.kind,
            prompt.score,
            prompt=text(prompt.token_ids),
            response=text(prompt.response_ids),
            answer=text(until_stop(answered[number], stop_ids)),
            ended=any(token in stop_ids for token in answered[number]),
        )
        for number, prompt in enumerate(sampler.prompts)
    ]
