"""Where a row stands in its file, as one number: its line, or its index in an array that has several rows on a line."""

from __future__ import annotations


def indexed(index: int) -> int:
    """The number of a row by its index, counted from 0. It is negative: lines count from 1."""
    return ~index


def place_of(name: str, number: int) -> str:
    """The place of a row in messages: `file:line`, or `file[index]`."""
    return f"{name}:{number}" if number > 0 else f"{name}[{~number}]"
