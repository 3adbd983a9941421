"""The reference log-probs in a checkpoint: those of the run's reference, by the run's attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.checkpoint.load import stored_reference
from uft_ds.errors import UserError
from uft_ds.known.cache import REFERENCE_TABLE
from uft_ds.known.store import write_table

PACKED, SDPA, OTHER = "a" * 64, "b" * 64, "c" * 64
TABLE = {b"k" * 16: -3.5}


def test_a_table_of_another_attention_is_told_from_that_of_another_reference(tmp_path: Path) -> None:
    """The first may be computed again; the second means that the files of two runs were mixed."""
    assert stored_reference(tmp_path, PACKED, {SDPA: "sdpa"}) == {}
    write_table(tmp_path / REFERENCE_TABLE, TABLE, SDPA)
    assert stored_reference(tmp_path, SDPA, {PACKED: "packed"}) == TABLE
    assert stored_reference(tmp_path, PACKED, {SDPA: "sdpa"}) == "sdpa"
    write_table(tmp_path / REFERENCE_TABLE, TABLE, OTHER)
    with pytest.raises(
        UserError, match=r"reference\.safetensors: belongs to another reference \(c{16}, expected a{16}"
    ):
        stored_reference(tmp_path, PACKED, {SDPA: "sdpa"})
