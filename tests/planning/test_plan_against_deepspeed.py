"""What is planned against what DeepSpeed allocates and sends on real ranks: the bars of `benchmarks/plan.py`."""

from pathlib import Path

import pytest
from plan import RANKS, SIZES, Cell, compare, grid, write_model


def test_two_ranks_hold_and_send_what_was_planned(tmp_path: Path) -> None:
    """Bytes sent within 1%, held within 10%: the smallest model, layers recomputed."""
    folder = write_model(tmp_path / "small", SIZES["small"])
    (row,) = compare([Cell(folder, gradient_checkpointing=True)], 2)
    assert row.measured.gathered > 0
    assert row.missed() == []


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
def test_the_grid(tmp_path: Path, ranks: int) -> None:
    """Three sizes, checkpointed or not, in lockstep and by two forwards."""
    folders = [write_model(tmp_path / name, size) for name, size in SIZES.items()]
    rows = compare(grid(folders, ["lockstep", "separate"]), ranks)
    assert len(rows) == 12
    assert {row.name: row.missed() for row in rows if row.missed()} == {}
