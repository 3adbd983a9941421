"""Shorten a prompt that is too long, from its beginning. Turns are cut, not tokens, so the template stays intact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from uft_ds.data.example import Message, Pair


def fitting_prompt(
    prompt: tuple[Message, ...], fits: Callable[[tuple[Message, ...]], bool]
) -> tuple[Message, ...] | None:
    """As much of a prompt's end as fits: the oldest exchanges are removed first, then the question's beginning.

    A system turn is kept. Trimming is done before the template is applied, so the template's tokens stay complete.
    None if nothing fits.
    """
    system = prompt[:1] if prompt and prompt[0].role == "system" else ()
    turns = prompt[len(system) :]
    questions = [index for index, message in enumerate(turns) if message.role == "user"]
    for question in questions[1:]:
        if fits((*system, *turns[question:])):
            return (*system, *turns[question:])
    if not questions:
        return None
    asked, after = turns[questions[-1]], turns[questions[-1] + 1 :]

    def from_character(start: int) -> tuple[Message, ...]:
        return (*system, replace(asked, content=asked.content[start:].lstrip()), *after)

    # Binary search for the earliest start that fits; `start` always fits, `too_early` does not.
    too_early, start = 0, len(asked.content.rstrip()) - 1
    if start <= 0 or not fits(from_character(start)):
        return None
    while start - too_early > 1:
        middle = (too_early + start) // 2
        too_early, start = (too_early, middle) if fits(from_character(middle)) else (middle, start)
    return from_character(start)


def common_prompt(pair: Pair) -> tuple[Message, ...]:
    """The turns at the beginning that both sides of a pair share."""
    sides = zip(pair.chosen.messages[:-1], pair.rejected.messages[:-1], strict=False)
    shared = 0
    for ours, theirs in sides:
        if ours != theirs:
            break
        shared += 1
    return pair.chosen.messages[:shared]
