"""Steps of sequences of which only the lengths matter."""

from dataclasses import replace

import numpy as np

from uft_ds.data.example import Response, Sequence
from uft_ds.data.mixture import Step


def of_lengths(lengths: list[int]) -> Step:
    """Sequences of these lengths whose last token is a response named by its number."""
    return Step(
        0,
        tuple(
            Sequence(np.arange(length, dtype=np.int32), (Response(length - 1, length, 0.5, "score", str(i)),))
            for i, length in enumerate(lengths)
        ),
    )


def of_units(units: list[tuple[int, ...]]) -> Step:
    """Sequences of these lengths; two in a tuple are the sides of a pair, numbered by its place."""
    sequences = []
    for number, lengths in enumerate(units):
        pair_id = number if len(lengths) == 2 else None
        for side, length in zip("ab", lengths, strict=False):
            response = Response(length - 1, length, 0.5, "pair" if pair_id is not None else "score", f"{number}{side}")
            response = replace(response, pair_id=pair_id)
            sequences.append(Sequence(np.arange(length, dtype=np.int32), (response,)))
    return Step(0, tuple(sequences))
