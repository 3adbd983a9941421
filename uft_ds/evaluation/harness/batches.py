"""Which requests are answered together: batches that follow from the requests alone.

They depend neither on the number of processes nor on what has been answered before, so an evaluation that was killed,
or that several processes shared, has the same batches and with them the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

MOST_ROWS = 256


@dataclass(frozen=True)
class BatchSize:
    """rows of each batch, or the tokens of a batch with its padding, from which the rows follow."""

    rows: int | None = None
    tokens: int | None = None

    def rows_of(self, width: int) -> int:
        """Rows of a batch whose longest one has `width` tokens."""
        if self.rows is not None:
            return self.rows
        assert self.tokens is not None, "one of both is given"
        return max(1, min(MOST_ROWS, self.tokens // width))


def cut(rows: Seq[Seq[int]], widths: Mapping[int, int], size: BatchSize) -> list[list[int]]:
    """Batches of neighbours; the first row of each is its longest.

    Args:
        rows: places of the requests that one row of a batch answers, the longest row first.
        widths: tokens of a row, by its first place.
    Returns:
        the places of each batch.
    """
    batches, start = [], 0
    while start < len(rows):
        end = start + size.rows_of(widths[rows[start][0]])
        batches.append([place for row in rows[start:end] for place in row])
        start = end
    return batches


def grouped(keys: Seq[Hashable]) -> list[list[int]]:
    """The places of equal keys, in the order in which the keys come first."""
    found: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.values())


def same_beginning(rows: Seq[Seq[int]]) -> int:
    """How many tokens all rows begin with alike."""
    # In the order of their tokens, all others lie between these two.
    first, last = min(rows, key=tuple), max(rows, key=tuple)
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


class CutQuestions:
    """Questions of which a prompt did not fit into the model's positions and lost its beginning."""

    def __init__(self) -> None:
        self._found: set[tuple[str, Hashable]] = set()

    def add(self, task: str | None, question: Hashable) -> None:
        self._found.add((task or "", question))

    def by_task(self) -> Counter[str]:
        """How many, by task; each counts once, however many choices it has."""
        return Counter(task for task, _ in self._found)
