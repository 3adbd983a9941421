"""Groups of a step's responses that are compared with each other: answers to one prompt, or all of the policy's own.

A group is one of the whole step, whichever ranks and micro-batches hold its responses. Every rank knows the whole step,
so all that depends on scores alone needs no communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.objectives.losses import OF_PROMPT
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.reward_shift import prompt_of, repeated_prompts

Comparison = Literal["shifted", "centered", "own", "all own"]
"""What is compared with the other members. shifted: rewards, by `prompt_mean`. centered: rewards and scores, by
`center`. own: the policy's own answers to one prompt. all own: all its answers of the step."""

ResponseName = tuple[bytes, Kind]
"""A response by its content and its kind. The same content may occur in two kinds, which may have different betas."""


@dataclass(frozen=True)
class Group:
    """One group. score_std: of the sample; exactly 0 if all scores are equal, whose mean is then exactly the score."""

    comparison: Comparison
    num_responses: int
    mean_score: float
    score_std: float

    @property
    def is_flat(self) -> bool:
        """Whether no answer is better than another."""
        return self.score_std == 0.0


@dataclass(frozen=True)
class Groups:
    """The groups of a step, numbered in the order of their first responses.

    numbers: of each response with a group, by what is compared and the response's key.
    """

    found: tuple[Group, ...] = ()
    numbers: Mapping[tuple[Comparison, bytes], int] = field(default_factory=dict)

    def number(self, objective: Objective, key: bytes, response: Response) -> int | None:
        """The number of a response's group; None without one."""
        comparison = comparison_of(objective, response)
        return None if comparison is None else self.numbers.get((comparison, key))

    def numbers_in(self, objective: Objective, batch: MicroBatch) -> list[int | None]:
        """The number of the group of each response of a micro-batch."""
        return [
            self.number(objective, key, response)
            for key, response in zip(batch.response_keys, batch.responses, strict=True)
        ]

    def divided(self, objective: Objective, batches: Iterable[MicroBatch]) -> set[int]:
        """The groups of which one of these micro-batches holds a part, but not all."""
        parts: set[int] = set()
        for batch in batches:
            held = Counter(self.numbers_in(objective, batch))
            parts |= {i for i in held if i is not None and held[i] < self.found[i].num_responses}
        return parts


def comparison_of(objective: Objective, response: Response) -> Comparison | None:
    """What a response may be compared with others by; None if its losses compare it with its score alone."""
    kind = response.kind
    policy_gradient = objective.policy_gradient(kind)
    if policy_gradient is not None:
        return None if not response.is_online else "own" if policy_gradient in OF_PROMPT else "all own"
    if objective.centers(kind):
        return "centered"
    return "shifted" if objective.shift.name == "prompt_mean" and objective.has_pointwise(kind) else None


def groups_of(objective: Objective, step: Step) -> Groups:
    """The groups of a step.

    A response without another answer to its prompt has none: it is neither shifted nor centred. The same answer twice
    is no other answer, unless the policy gave it twice.
    """
    members: dict[tuple[Comparison, bytes], list[tuple[Hashable, bytes, Response]]] = {}
    for place, (sequence, response, key) in enumerate(_spans(step)):
        comparison = comparison_of(objective, response)
        if comparison is not None:
            prompt = b"" if comparison == "all own" else prompt_of(sequence, response)
            answer = place if response.is_online and comparison != "shifted" else key
            members.setdefault((comparison, prompt), []).append((answer, key, response))
    found: list[Group] = []
    numbers: dict[tuple[Comparison, bytes], int] = {}
    for (comparison, prompt), answers in members.items():
        if not repeated_prompts([prompt] * len(answers), [answer for answer, *_ in answers]):
            continue
        numbers |= {(comparison, key): len(found) for _, key, _ in answers}
        found.append(_group(comparison, [response.score for *_, response in answers]))
    return Groups(tuple(found), numbers)


def units_of(objective: Objective, groups: Groups, chosen: set[int], step: Step) -> Step:
    """The units of a step that have a response of the chosen groups."""
    kept = (
        unit
        for unit in step.units
        if any(
            groups.number(objective, key, response) in chosen
            for sequence in unit
            for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
        )
    )
    return Step(step.index, tuple(sequence for unit in kept for sequence in unit))


def group_means(
    objective: Objective, groups: Groups, chosen: set[int], step: Step, log_ratios: Mapping[ResponseName, float]
) -> dict[int, float]:
    """The mean log-ratio of each chosen group, nats, by its number.

    Args:
        log_ratios: must contain the responses of these groups.
    """
    members: dict[int, list[float]] = {}
    for _, response, key in _spans(step):
        number = groups.number(objective, key, response)
        if number is not None and number in chosen:
            members.setdefault(number, []).append(log_ratios[key, response.kind])
    return {number: float(np.mean(ratios)) for number, ratios in members.items()}


def _group(comparison: Comparison, scores: Seq[float]) -> Group:
    if len(set(scores)) == 1:  # the mean of equal numbers may differ from them in the last bit
        return Group(comparison, len(scores), scores[0], 0.0)
    return Group(comparison, len(scores), float(np.mean(scores)), float(np.std(scores, ddof=1)))


def _spans(step: Step) -> Seq[tuple[Sequence, Response, bytes]]:
    """Each response with its sequence and its key, in the order of the step."""
    return [
        (sequence, response, key)
        for sequence in step.sequences
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
    ]
