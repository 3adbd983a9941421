"""A judge's verdict: asked for under a name that is drawn for each request, and read by that name alone.

The text of an answer can imitate any verdict but not the name, which it cannot know. So it may talk a judge round,
which no parser prevents, but it never *is* the verdict.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

NONCE_BYTES = 12


def draw_nonce(texts: Sequence[str]) -> str:
    """A name that is in none of the texts: 96 bits at random."""
    while True:
        nonce = f"verdict_{secrets.token_hex(NONCE_BYTES)}"
        if not any(nonce in text for text in texts):
            return nonce


def grade_in(reply: str, nonce: str, low: float, high: float) -> float:
    """The number of `{"<nonce>": number}` in a judge's reply.

    Raises:
        ValueError: there is no such object, or more than one, or another value.
    """
    value = _verdict_in(reply, nonce)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"the verdict is {value!r:.40}, expected a number from {low:g} to {high:g}")
    return float(value)


def preference_in(reply: str, nonce: str) -> float:
    """The share of the first answer in `{"<nonce>": "A"}`: 1 for A, 0 for B, 0.5 for "tie".

    Raises:
        ValueError: there is no such object, or more than one, or another value.
    """
    value = _verdict_in(reply, nonce)
    shares = {"A": 1.0, "B": 0.0, "tie": 0.5}
    if not isinstance(value, str) or value not in shares:
        raise ValueError(f'the verdict is {value!r:.40}, expected "A", "B" or "tie"')
    return shares[value]


def _verdict_in(reply: str, nonce: str) -> Any:
    starts = [match.start() for match in re.finditer(r'\{\s*"' + re.escape(nonce) + '"', reply)]
    if len(starts) != 1:
        raise ValueError(f"the reply has {len(starts) or 'no'} verdict{'s' if len(starts) > 1 else ''}, expected one")
    try:
        value, _ = json.JSONDecoder(object_pairs_hook=_once).raw_decode(reply, starts[0])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the verdict is no JSON object ({error})") from None
    return value[nonce]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found
