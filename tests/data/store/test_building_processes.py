"""The store is the same whatever the number of processes, and a killed one is said."""

from pathlib import Path
from typing import Any

import pytest
from sources import write_rows
from stores import build, refusal
from suites import long_but

from uft_ds.data.store import building
from uft_ds.data.store.building import QUARANTINE
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


@pytest.mark.parametrize("how", long_but(["forked"], ["forked", "spawned"]))
def test_any_number_of_processes_builds_the_same_store(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, how: str, request: pytest.FixtureRequest
) -> None:
    """Three processes write byte for byte what one does, bad rows, drops and places included."""
    if how == "forked":
        request.getfixturevalue("forked_workers")
    monkeypatch.setattr(building, "_CHUNK_ROWS", 7)
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "response": f"a{i} " * (i % 9 + 1)} for i in range(200)]
    rows[50] |= {"response": ""}
    rows[120] |= {"response": "x<|im_end|>y"}
    rows[150] |= {"prompt": "long " * 200}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, three = (build(path, chat, quarantine=True, workers=workers, max_length=256) for workers in (1, 3))
    for name in ("tokens.bin", "sequences.bin", "units.bin", "responses.bin", "index.json", QUARANTINE):
        assert (one.folder / name).read_bytes() == (three.folder / name).read_bytes()
    assert one.account.rows == 200
    assert one.account.quarantined == 1
    assert one.account.dropped == {"special token in the text": 1, "longer than max_length": 1}
    assert one.places_of("longer than max_length") == (f"{path}:151",)
    assert len(one) == 197


@pytest.mark.usefixtures("forked_workers")
def test_a_killed_process_is_said(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenising process that the system kills ends the build with a message, not a hang."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 2)
    monkeypatch.setattr(building, "_start_worker", _die)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}] * 50)
    assert "was killed; out of memory? Set data.workers lower" in refusal(path, chat, workers=2)


def _die(examine: object) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
