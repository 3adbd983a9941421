"""How a run has the reference's log-probs: one vocabulary for model, cache and planner."""

from __future__ import annotations

from typing import Literal

HowForwarded = Literal["lockstep", "separate"]
"""lockstep: both streams in one visit of each layer. separate: a forward of its own, within the same call."""

HowReference = Literal["none", "lockstep", "separate", "cached"]
"""none: no loss compares with a reference. lockstep, separate: it is forwarded for each response that is met.
cached: it is forwarded once for each response, and known from then on."""


def is_forwarded_each_time(how: HowReference) -> bool:
    """Whether nothing is remembered, so that each response needs the reference's forward."""
    return how in ("lockstep", "separate")


def how_known(*, needed: bool, cached: bool, forwarded: HowForwarded) -> HowReference:
    """How a run has its reference, by whether a loss needs one, whether it is cached, and how it is forwarded."""
    if not needed:
        return "none"
    return "cached" if cached else forwarded
