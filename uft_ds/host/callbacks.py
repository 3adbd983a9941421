"""Types of the callbacks by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Called with a line of text for the user."""

OnProgress = Callable[[str, int, int], None]
"""Called with (the name of the work, the amount done, the total amount), in bytes, files or layers."""
