"""What two records of settings differ in, said in words: work that was begun goes on with the same settings only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_LONGEST = 60
"""Letters of a value that a message shows."""


def differing(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) for each key in which two records differ, keys as `judge.temperature`.

    Args:
        before, now: values as JSON has them; a key that one of two mappings lacks is None there.
        name: of the key that holds them.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from differing(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, before, now


def differences(before: Any, now: Any) -> list[str]:
    """One sentence for each key, as `judge.temperature: 0 there, 1 now`; none if the records are equal."""
    return [f"{name}: {_short(then)} there, {_short(found)} now" for name, then, found in differing(before, now)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
