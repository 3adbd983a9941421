"""How uneven a packing is: the measure of the data benchmark and of the tests of `uft_ds/data/packing.py`.

Not a benchmark itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from uft_ds.data.example import Sequence
from uft_ds.data.packing import cost_of


def imbalance(packed: Seq[Seq[Seq[Sequence]]], attention_parity: float = math.inf) -> tuple[float, float]:
    """How uneven a packing is, as (ranks' totals, waiting); 0 is best for both.

        ranks' totals   max over ranks of the rank's cost / their mean - 1
        waiting         sum over micro-steps of the costliest rank's cost / the mean of the ranks' totals - 1

    Ranks wait for each other in every micro-step, so `waiting` is the share of time lost. It is never less than the
    imbalance of the totals.
    """
    cost_WM = np.array(
        [[sum(cost_of(s.num_tokens, attention_parity) for s in sequences) for sequences in rank] for rank in packed],
        dtype=np.int64,
    )
    mean = cost_WM.sum() / len(packed)
    if mean == 0:
        return 0.0, 0.0
    return float(cost_WM.sum(1).max() / mean - 1), float(cost_WM.max(0).sum() / mean - 1)
