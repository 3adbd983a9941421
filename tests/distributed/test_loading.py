"""No rank holds the whole model while it is loaded under ZeRO-3."""

from pathlib import Path

import pytest
from loading_memory import measure, write_model


@pytest.mark.long
def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    """On two ranks each peaks below the model; unpartitioned, the same measure finds it whole."""
    size = write_model(tmp_path, hidden=1024, layers=12)
    for row in measure(tmp_path, 2, partitioned=True):
        assert row["peak"] < 0.8 * size
        assert row["after"] < 0.75 * size
    for row in measure(tmp_path, 2, partitioned=False):
        assert row["peak"] > 0.95 * size
