"""Every test of sweeps runs in a folder of its own, beside the toy recipe."""

from pathlib import Path

import pytest
from sweeps import write_toy_recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_toy_recipe()
