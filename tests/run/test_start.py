"""What is shown while a run is prepared."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from uft_ds.run.start import preparation


def test_slow_preparation_tells_its_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every five seconds, in a file or a pipe; what is done at once says nothing."""
    now = iter([0.0, 1.0, 6.0, 6.0, 7.0, 12.0, 12.0])
    monkeypatch.setattr("uft_ds.run.start.time.monotonic", lambda: next(now))
    file = io.StringIO()
    with preparation(Console(file=file, width=200)) as on_progress:
        for label, done in (
            ("reading rows.jsonl", 50),
            ("hashing base", 25),
            ("hashing base", 50),
            ("hashing base", 75),
        ):
            on_progress(label, done, 100)
    assert file.getvalue().splitlines() == ["hashing base: 25%", "hashing base: 75%"]
