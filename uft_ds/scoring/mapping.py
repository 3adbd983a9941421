"""Rules that turn a scorer's raw values into scores from 0 to 1. A value outside a rule is a failure, never clipped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from uft_ds.data.score_map import quantiles
from uft_ds.errors import UserError
from uft_ds.scoring.isotonic import isotonic_map, read_calibration

RULES = "sigmoid, affine:LOW,HIGH, quantile or isotonic:FILE"

Map = Callable[[float], float]
"""Of one raw value; raises ValueError that says why it has no score."""


def map_named(rule: str, raw_R: Sequence[float], scorer: str) -> Map:
    """The map of a rule, as `--map` gives it.

        sigmoid            1 / (1 + exp(-raw))
        affine:LOW,HIGH    (raw - LOW) / (HIGH - LOW); LOW above HIGH turns the order round
        quantile           the share of all raw values that are lower; equal ones count half
        isotonic:FILE      fitted to labelled answers, monotone; linear between the blocks

    Args:
        raw_R: [responses], all raw values, which `quantile` needs.
        scorer: the name of the scorer, which a file for `isotonic` must agree with.
    Raises:
        UserError: there is no such rule, or its file cannot be used.
    """
    name, _, argument = rule.partition(":")
    if name == "sigmoid" and not argument:
        return _sigmoid
    if name == "quantile" and not argument:
        return quantiles(np.asarray(raw_R, dtype=np.float64)) if len(raw_R) else _sigmoid
    if name == "affine":
        return _affine(*bounds_of(argument, f"--map {rule}"))
    if name == "isotonic" and argument:
        return isotonic_map(*read_calibration(Path(argument), scorer))
    raise UserError(f"--map: found {rule!r}, expected {RULES}")


def check_rule(rule: str, scorer: str) -> None:
    """Refuse a rule that could not be applied in the end, before anything is scored."""
    map_named(rule, (), scorer)


def rule_identity(rule: str, scorer: str) -> str:
    """The rule; with a file, a hash of what is read of it besides: scores depend on that, not on the file's name.

    Raises:
        UserError: as `map_named`.
    """
    name, _, argument = rule.partition(":")
    if name != "isotonic" or not argument:
        return rule
    digest = hashlib.sha256()
    for values_R in read_calibration(Path(argument), scorer):
        digest.update(values_R.tobytes())
    return f"{rule}#{digest.hexdigest()[:12]}"


def bounds_of(text: str, option: str) -> tuple[float, float]:
    """`LOW,HIGH`: two different finite numbers.

    Raises:
        UserError: names the option.
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"{option}: found {text!r}, expected two numbers LOW,HIGH such as 1,10") from None
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise UserError(f"{option}: found {text!r}, expected two different finite numbers")
    if not math.isfinite(high - low):  # every score would be 0
        raise UserError(f"{option}: found {text!r}, expected numbers whose difference is finite")
    return low, high


def shortest(number: float) -> str:
    """A number in as few letters as hold all of it: `{:g}` alone keeps six digits."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _sigmoid(raw: float) -> float:
    return 1 / (1 + math.exp(-raw)) if raw >= 0 else math.exp(raw) / (1 + math.exp(raw))


def _affine(low: float, high: float) -> Map:
    def mapped(raw: float) -> float:
        score = (raw - low) / (high - low)
        if not 0 <= score <= 1:
            raise ValueError(f"the raw score {raw:g} is not from {low:g} to {high:g} (affine:{low:g},{high:g})")
        return score

    return mapped
