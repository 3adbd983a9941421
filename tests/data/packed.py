"""A packing to compare between processes: apart from the tests, whose imports take five CPU seconds."""

import numpy as np
from lengths import of_units

from uft_ds.data.example import Sequence
from uft_ds.data.packing import Packing, pack


def origins(packed: list[list[list[Sequence]]]) -> list[list[list[str]]]:
    return [[[s.responses[0].origin for s in bin_] for bin_ in rank] for rank in packed]


def packed_origins() -> str:
    lengths = np.random.default_rng(3).integers(2, 60, size=(90, 2)).tolist()
    units = [tuple(unit) if i % 3 else (unit[0],) for i, unit in enumerate(lengths)]
    return "".join(
        str(origins(pack(of_units(units), tokens_per_micro_batch=capacity, world_size=3, packing=Packing(40.0))))
        for capacity in (120, 150)
    )
