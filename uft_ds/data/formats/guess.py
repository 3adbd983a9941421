"""Which formats a row is of, judged by reading it as each of them."""

from __future__ import annotations

from uft_ds.data.formats.columns import refused_columns
from uft_ds.data.formats.fields import LeftOut, Row
from uft_ds.data.formats.table import FORMATS, PROMPTS, Format
from uft_ds.data.formats.turns import check_item

# A row that has lost its response would be a prompt, which is no way out.
_OURS = {name: make for name, make in FORMATS.items() if name != PROMPTS}


def other_formats(row: Row, given: str) -> str:
    """What a row that its format cannot read is instead; empty if no other format of this package reads it.

    Of a format of another package nothing is said: what its rows look like is not known here.
    """
    names = [name for name, make in _OURS.items() if name != given and _reads_whole(row, make)]
    if given not in _OURS or not names:
        return ""
    keys = ", ".join(key for key, value in row.items() if value is not None)
    either = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"keys {keys}: this is format {either}"


def _reads_whole(row: Row, make: Format) -> bool:
    try:
        items = list(make(row, score=None))
        for item in items:
            check_item(item)
    except (ValueError, LeftOut):
        return False
    has_feedback = any(getattr(item, "kind", "pair") != "instruction" for item in items)
    return bool(items) and refused_columns(row, make, has_feedback=has_feedback) is None
