"""A few of the answers that an online run has trained on, for its report."""

from __future__ import annotations

from uft_ds.record.samples import Trained
from uft_ds.rollouts.record import Group, RecordFolder

_STEPS, _PROMPTS = 8, 2


def shown(record: RecordFolder) -> list[Trained]:
    """Two prompts of each of at most eight steps, the first and the last among them; none if there is no record.

    Raises:
        UserError: a file of the record is damaged.
    """
    found = []
    for number in _spread(record.numbers()):
        step = record.read(number)
        groups = [] if step is None else [group for group in step.groups if not group.left_out]
        found += [_trained(number, group) for group in groups[:_PROMPTS]]
    return found


def _spread(numbers: list[int]) -> list[int]:
    """At most `_STEPS` of them, evenly, with both ends."""
    last = len(numbers) - 1
    places = sorted({round(last * place / (_STEPS - 1)) for place in range(_STEPS)}) if numbers else []
    return [numbers[place] for place in places]


def _trained(number: int, group: Group) -> Trained:
    answers = tuple((answer.text, answer.score) for answer in group.answers if answer.score is not None)
    prompt = str(group.messages[-1]["content"]) if group.messages else ""
    return Trained(number, group.origin, prompt, answers)
