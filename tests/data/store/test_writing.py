"""Stores are written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from stores import singles

from uft_ds.data.example import Response, Sequence
from uft_ds.data.store.store_files import INDEX, Place
from uft_ds.data.store.writing import StoreWriter, pack_units


def test_a_fact_that_a_store_cannot_hold_is_refused() -> None:
    """Nothing but scores is stored: another fact is not lost without an error."""
    response = Response(1, 2, 0.5, "score", other_facts={"advantage": 1.0})
    unit = (Sequence(np.arange(2, dtype=np.int32), (response,)),)
    with pytest.raises(ValueError, match="advantage would be lost"):
        pack_units([(unit, Place(0, 1, 0))])


def test_the_index_is_written_last(tmp_path: Path) -> None:
    """A writer that has not finished leaves no index, so that nobody takes the folder for a store."""
    writer = StoreWriter(tmp_path)
    writer.add(pack_units(singles(3)))
    writer.close()
    assert not (tmp_path / INDEX).exists()
