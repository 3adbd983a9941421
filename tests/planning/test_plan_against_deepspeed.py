"""What is planned against what DeepSpeed allocates and sends on real ranks: the bars of `benchmarks/plan.py`."""

from pathlib import Path

import pytest
from plan import RANKS, compare
from plan_cells import COPIED, REWARD_MODEL, SIZES, TRAINS_ALL, Cell, grid, of_mixture, write_model

pytestmark = pytest.mark.long
"""By their parts, in one process: `test_activations.py` and `test_structure.py`; what is gathered, by
`tests/distributed/test_reference_traffic.py`."""


def test_two_ranks_hold_and_send_what_was_planned(tmp_path: Path) -> None:
    """Bytes sent within 1%, held within 10%: layers recomputed in float32, and kept in bfloat16; a reward model, all
    parameters trained, also beside a copy of the base; rows that both ranks share, a base in NF4, and a mixture whose
    experts are frozen or adapted."""
    folder = write_model(tmp_path / "small", SIZES["small"])
    cells = [Cell(folder, gradient_checkpointing=True), Cell(folder, gradient_checkpointing=False, dtype="bfloat16")]
    cells += [Cell(folder, gradient_checkpointing=True, mode=mode) for mode in (REWARD_MODEL, TRAINS_ALL, COPIED)]
    cells.append(Cell(folder, gradient_checkpointing=True, sequence_size=2))
    cells.append(Cell(folder, gradient_checkpointing=True, dtype="bfloat16", quantization="nf4"))
    cells += of_mixture(tmp_path)
    rows = compare(cells, 2)
    assert all(row.measured.gathered > 0 for row in rows)
    assert {row.name: row.missed() for row in rows if row.missed()} == {}


def test_a_second_copy_inside_a_node_leaves_adapters_alone_to_cross(tmp_path: Path) -> None:
    """`zero_hpz_partition_size` 2 on 4 ranks: of all ranks' gathers only the adapters', once a step."""
    folder = write_model(tmp_path / "small", SIZES["small"])
    (row,) = compare([Cell(folder, gradient_checkpointing=True, secondary=2)], 4)
    assert 0 < row.measured.far < row.measured.gathered / 100
    assert row.missed() == []


@pytest.mark.parametrize("ranks", RANKS)
def test_the_grid(tmp_path: Path, ranks: int) -> None:
    """The smallest size, checkpointed or not, in one visit and by two forwards; on two ranks the other sizes too."""
    sizes = list(SIZES.items())[: None if ranks == 2 else 1]
    folders = [write_model(tmp_path / name, size) for name, size in sizes]
    rows = compare([*grid(folders, ["lockstep"]), *grid(folders[:1], ["separate"])], ranks)
    assert len(rows) == 2 * len(sizes) + 2
    assert {row.name: row.missed() for row in rows if row.missed()} == {}
