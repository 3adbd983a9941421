"""`uft judge` on a folder with questions, answers, references and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged import PROMPTS, QUESTIONS, Uft, write_answers
from runs import write_rows

from uft_ds.scoring import pacing


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def uft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Uft:
    """With four questions, answers of 2 to 9, references, and prompts in FastChat's layout."""
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    write_answers(tmp_path / "a.jsonl", [[f"grade {2 + 2 * n}", f"grade {3 + 2 * n}"] for n in range(4)])
    write_answers(tmp_path / "ref.jsonl", [[f"ref {n} one", f"ref {n} two"] for n in range(4)], model="gpt-4")
    write_rows(tmp_path / "p.jsonl", [{"name": name, **prompt} for name, prompt in PROMPTS.items()])
    return Uft(tmp_path, monkeypatch, capsys)
