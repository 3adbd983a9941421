"""How much a run trains on: responses, steps, epochs and tokens, from the token cache or as the recipe states them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uft_ds.data.mixture import amounts_of
from uft_ds.data.rows.reading import find_data
from uft_ds.data.sources import PreparedData, PreparedSource, open_source
from uft_ds.data.store.tokenized import is_whole, store_key
from uft_ds.errors import UserError
from uft_ds.recipe.settings import Settings
from uft_ds.streams.data_tokenizer import data_tokenizer
from uft_ds.streams.load import check_base
from uft_ds.training.steps import steps_of


@dataclass(frozen=True)
class Amount:
    """The responses of all steps of a run.

    A step holds at least `examples_per_step` responses: a pair, the turns of a conversation and the answers to one
    prompt stay together. How many more only the token cache says. By the recipe alone, the steps that it states hold
    `responses` or more, and the responses that it states make `steps` steps or fewer.
    """

    responses: int
    steps: int
    epochs: float | None
    """Of `responses`; None if the recipe states the steps, but not how many responses an epoch has."""
    tokens: int | None
    """Of all steps, prompts included; None if the data is not in the token cache."""
    counted_from: Literal["token cache", "recipe"]
    states_steps: bool = False
    """Whether `responses` are the least that the recipe's train.steps take, not its own number."""

    @property
    def tokens_per_response(self) -> int | None:
        """The mean, rounded up."""
        return None if self.tokens is None else -(-self.tokens // max(self.responses, 1))


def amount_of(settings: Settings) -> Amount | None:
    """What a run trains on; None if neither the token cache nor the recipe says it.

    Local data whose tokens another command has put into the cache is counted there. Nothing is tokenised or downloaded.
    """
    sources = _tokenised(settings)
    return _stated(settings) if sources is None else _counted(settings, sources)


def _tokenised(settings: Settings) -> tuple[PreparedSource, ...] | None:
    """The training sources, if the cache has the tokens of them all."""
    model, data = settings.model, settings.data
    if not all(Path(path).exists() for path in (model.base, *(source.path for source in data.sources))):
        return None
    try:
        chat = data_tokenizer(model, check_base(model.base, model.revision))
        found = []
        for source in data.sources:
            files = find_data(source.path, source.split)
            key = store_key(files, source.rules, chat)
            if not is_whole(data.cache_dir / key):
                return None
            found.append(open_source(source, data.cache_dir, key, files.names, seed=settings.train.seed))
    except UserError:  # told by the commands that read the data; a plan needs none
        return None
    return tuple(found) if all(source.selection.num_responses for source in found) else None


def _counted(settings: Settings, sources: tuple[PreparedSource, ...]) -> Amount | None:
    data = PreparedData(sources, ())
    try:
        amounts, steps = data.epoch_amounts, steps_of(settings, data)
    except ValueError:
        return None
    per_epoch = sum(amounts)
    lengths = [_length_of(source) for source in sources]
    mean = sum(amount * length for amount, length in zip(amounts, lengths, strict=True)) / per_epoch
    responses = steps.num_responses()
    epochs = settings.train.epochs if settings.train.steps is None else responses / per_epoch
    return Amount(responses, len(steps), epochs, round(responses * mean), "token cache")


def _length_of(source: PreparedSource) -> float:
    """Mean tokens of a response with its prompt; an answer that the policy will give counts as long as it may be."""
    tokens = source.selection.num_tokens / source.selection.num_responses
    return tokens if source.settings.asked is None else tokens + source.settings.asked.answer_tokens


def _stated(settings: Settings) -> Amount | None:
    """By `examples` of every source, or by train.steps."""
    train, sources = settings.train, settings.data.sources
    sizes = [
        source.examples * (1 if source.asked is None else source.asked.answers) for source in sources if source.examples
    ]
    per_epoch = None
    if len(sizes) == len(sources):
        try:
            per_epoch = sum(amounts_of(sizes, [source.portion for source in sources]))
        except ValueError:  # the portions do not make a mixture, which training refuses by name
            return None
    if per_epoch is None and train.steps is None:
        return None
    per_step = train.examples_per_step
    if train.steps is None:
        responses = round((per_epoch or 0.0) * train.epochs)
        return Amount(responses, math.ceil(responses / per_step), train.epochs, None, "recipe")
    responses = train.steps * per_step
    return Amount(responses, train.steps, responses / per_epoch if per_epoch else None, None, "recipe", True)
