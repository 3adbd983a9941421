"""Isotonic calibration: the monotone function that is nearest to the labels, by pool-adjacent-violators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.data.formats.scales import checked_score
from uft_ds.data.rows.reading import find_data, parse_row, raw_rows
from uft_ds.errors import UserError

META_KEY = "scoring"
"""The key of a row's `meta` under which `uft score` writes."""


def isotonic_fit(raw_R: np.ndarray, target_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The non-decreasing function of raw values with the least sum of squared distances to the targets.

    Args:
        raw_R, target_R: [responses], float64. Equal raw values are first averaged.
    Returns:
        [distinct raw values] each: the values in ascending order, and what the function is there.
    """
    raw_V, inverse_R, counts_V = np.unique(raw_R, return_inverse=True, return_counts=True)
    means_V = np.bincount(inverse_R, weights=target_R) / counts_V
    blocks: list[tuple[float, int, int]] = []  # (mean, weight, number of distinct values)
    for mean, weight in zip(means_V.tolist(), counts_V.tolist(), strict=True):
        size = 1
        while blocks and blocks[-1][0] >= mean:
            before, heavy, wide = blocks.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, size = heavy + weight, wide + size
        blocks.append((mean, weight, size))
    return raw_V, np.repeat([mean for mean, _, _ in blocks], [size for _, _, size in blocks])


def isotonic_map(raw_R: np.ndarray, target_R: np.ndarray) -> Callable[[float], float]:
    """The fitted function, linear between the raw values; outside of them it raises ValueError."""
    raw_V, fitted_V = isotonic_fit(raw_R, target_R)

    def mapped(raw: float) -> float:
        if not raw_V[0] <= raw <= raw_V[-1]:
            raise ValueError(
                f"the raw score {raw:g} is outside of the calibration's, which are from {raw_V[0]:g} to {raw_V[-1]:g}"
            )
        return float(min(max(np.interp(raw, raw_V, fitted_V), 0.0), 1.0))  # rounding may overstep the ends

    return mapped


def read_calibration(path: Path, scorer: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw values and targets from 0 to 1, [answers] each: rows `{"raw": ..., "target": ...}`, or rows that `uft score`
    wrote of data with scores or labels (`meta.scoring.raw` and `given`).

    Args:
        scorer: the name of the scorer whose values are to be mapped. Rows of `uft score` must be of the same.
    Raises:
        UserError: file and line, what was found and what was expected.
    """
    data = find_data(str(path), None)
    raws: list[float] = []
    targets: list[float] = []
    for row in raw_rows(data):
        place = data.place(row.file, row.line)
        try:
            for raw, target in _labelled(parse_row(row.value), scorer):
                raws.append(_number(raw, "raw"))
                targets.append(checked_score(target, "target"))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    if len(set(raws)) < 2:
        raise UserError(f"{path}: {len(set(raws))} different raw scores, expected at least 2 to fit a function")
    return np.asarray(raws), np.asarray(targets)


def _labelled(row: Mapping[str, Any], scorer: str) -> Iterator[tuple[Any, Any]]:
    if "raw" in row:
        yield row["raw"], row.get("target")
        return
    meta = row.get("meta")
    ours = meta.get(META_KEY) if isinstance(meta, Mapping) else None
    if not isinstance(ours, Mapping):
        raise ValueError("neither `raw` and `target`, nor a row that `uft score` wrote")
    if ours.get("scorer") != scorer:
        raise ValueError(f"scored by {ours.get('scorer')}, expected {scorer}; calibrate with the same scorer")
    raw, given = ours.get("raw"), ours.get("given")
    if given is None:
        raise ValueError("`meta.scoring` has no `given`: the data that was scored had no scores or labels")
    yield from zip(raw, given, strict=True) if isinstance(raw, list) else ((raw, given),)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name!r}: found {value!r}, expected a number")
    return float(value)
