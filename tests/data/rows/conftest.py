"""Fixtures of the tests of data."""

from pathlib import Path

import pytest
from reading_rows import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Put bytes into a file of the test's folder."""

    def put(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return put
