"""AlpacaEval's win rate: a model's answers against a reference's, compared in both orders."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from uft_ds.data.example import Message
from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks.alpaca_eval import Output
from uft_ds.evaluation.results import ItemResult, TaskResult
from uft_ds.scoring.item import Item, Judgement
from uft_ds.scoring.judge import CONTRADICTION

TASK = "alpaca_eval"
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Duel:
    """Two answers to one instruction. occurrence: how often the instruction stands before it in the reference."""

    place: str
    instruction: str
    answer: str
    reference: str
    occurrence: int = 0

    @property
    def item(self) -> str:
        """The same for the same instruction, whoever answers it."""
        digest = hashlib.sha256(self.instruction.encode()).hexdigest()[:16]
        return digest if not self.occurrence else f"{digest}-{self.occurrence}"

    def sides(self, row: int) -> list[Item]:
        """Both answers as a judge compares them, the model's first."""
        asked = (Message("user", self.instruction),)
        return [Item(self.place, asked, text, row=row) for text in (self.answer, self.reference)]


def duels_of(
    answers: Sequence[Output], reference: Sequence[Output], names: tuple[Path, Path], limit: int | None
) -> list[Duel]:
    """The model's answer and the reference's to each instruction, in the reference's order.

    Args:
        names: of both files, for messages. limit: the reference's first instructions only.
    Raises:
        UserError: an instruction stands in one of the files alone.
    """
    own, others = _by_key(answers), _by_key(reference)
    for key, one in own.items():
        if key not in others:
            raise UserError(f"{one.place}: its instruction is not in {names[1]}; expected the same instructions")
    duels = []
    for key, other in list(others.items())[:limit]:
        if key not in own:
            raise UserError(
                f"{other.place}: its instruction has no answer in {names[0]}; answer it, or take the reference's first "
                "instructions alone by --limit"
            )
        duels.append(Duel(own[key].place, key[0], own[key].output, other.output, key[1]))
    return duels


def result_of(
    duels: Sequence[Duel],
    judgements: Sequence[Judgement],
    *,
    judge: str,
    version: str,
    further: Mapping[str, float] = MappingProxyType({}),
) -> tuple[TaskResult, list[ItemResult]]:
    """The mean share of the model's answers: 1 for a win in both orders, 1/2 for a tie or a contradiction.

    Args:
        judgements: of each duel, with the model's share. A duel without one is no item.
        further: metrics that stand beside the win rate.
    """
    items = [
        ItemResult(duel.item, {"win_rate": judgement.value, "average_characters": float(len(duel.answer))})
        for duel, judgement in zip(duels, judgements, strict=True)
        if judgement.value is not None
    ]
    shares = [judgement.value for judgement in judgements if judgement.value is not None]
    low, high = wilson(sum(shares), len(shares))
    metrics = {
        "win_rate": fmean(shares),
        "win_rate,low_95": low,
        "win_rate,high_95": high,
        **further,
        "contradictions": fmean(CONTRADICTION in one.notes for one in judgements if one.value is not None),
        "average_characters": fmean(len(duel.answer) for duel in duels),
        "average_characters,reference": fmean(len(duel.reference) for duel in duels),
        "failed": fmean(judgement.value is None for judgement in judgements),
    }
    return TaskResult(TASK, metrics, len(shares), version, judge=judge), items


def wilson(wins: float, count: int) -> tuple[float, float]:
    """The 95% interval of a mean of values in [0, 1] by Wilson (1927); where ties are among them it is rather too wide.

        (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n),  p = wins / n

    Args:
        wins: the sum of the values. count: at least 1.
    """
    p, z2 = wins / count, _NORMAL_95**2
    middle, half = p + z2 / (2 * count), _NORMAL_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    scale = 1 + z2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _by_key(outputs: Sequence[Output]) -> dict[tuple[str, int], Output]:
    """Outputs by instruction, and how often that stands before."""
    seen: Counter[str] = Counter()
    found = {}
    for one in outputs:
        found[one.instruction, seen[one.instruction]] = one
        seen[one.instruction] += 1
    return found
