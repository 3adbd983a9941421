"""How long work tells whoever waits for it what it does, and how far it is."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with a line of text for the user."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done (bytes, files, layers), of how much."""
