"""What reaches the terminal: text of data, of file names and of errors never controls it; durations, long reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_KEPT = "\n\t"
_OF_DIRECTION = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they show text in another order than it has
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in _OF_DIRECTION},
}


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in words: `1 h 2 min`, `12 min 3 s`, `4 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def in_one_line(text: str, most: int) -> str:
    """The text with single spaces, cut behind a word where it has more than `most` letters, which `...` then shows.

    Reasons that libraries give go into our messages; transformers' may list all the model types that there are.
    """
    words = " ".join(text.split())
    if len(words) <= most:
        return words
    return f"{words[: most + 1].rpartition(' ')[0] or words[:most]} ..."


def visible(text: str) -> str:
    """The text with pictures and escapes for control characters, newline and tab aside: ESC becomes U+241B.

    Rows and file names come from elsewhere. Sent as they are, they could set the terminal's title, clear the screen,
    or show a line that is not there.
    """
    return text.translate(_VISIBLE)


def as_typed(text: str) -> str:
    """The text with paths below the working directory relative to it, as users type them.

    Settings hold absolute paths, so that a run does not depend on where it is started; a terminal would wrap them.
    """
    try:
        here = str(Path.cwd())
    except OSError:  # the directory has been deleted
        return text
    if here == "/":
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(here)}/(?=[^\s/])", "", text)


class SafeConsole(Console):
    """A console of rich on which text is always visible; colours and the movements of its own displays stay.

    Paths below the working directory are shown relative to it, in plain text; tables do that themselves.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(as_typed(found) if isinstance(found, str) else found for found in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
