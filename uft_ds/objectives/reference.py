"""The streams that losses read, and the ways to obtain the reference's log-probs.

One vocabulary for losses, model, cache and planner.
"""

from __future__ import annotations

from typing import Literal

POLICY_STREAM, REFERENCE_STREAM = "policy", "reference"
"""The names of the two streams that a loss compares, by which outputs, log-probs and known values are found."""

REWARD_STREAM = "reward"
"""The name of the stream of a reward head: the value that it gives to each response."""

RewardBy = Literal["implicit", "head"]
"""What the reward of a response is. implicit: beta * its log-ratio. head: the value of a reward head."""

HowForwarded = Literal["lockstep", "separate"]
"""lockstep: both streams pass each layer together. separate: the reference has its own forward in the same call."""

HowReference = Literal["none", "lockstep", "separate", "cached"]
"""none: no loss compares with a reference. lockstep, separate: it is forwarded for each response in every step.
cached: it is forwarded once for each response, and its log-prob is kept."""


def is_forwarded_each_time(how: HowReference) -> bool:
    """Whether no log-prob is kept, so that each response needs the reference's forward."""
    return how in ("lockstep", "separate")


def how_known(*, needed: bool, cached: bool, forwarded: HowForwarded) -> HowReference:
    """How a run obtains its reference, from whether a loss needs one, whether it is cached and how it is forwarded."""
    if not needed:
        return "none"
    return "cached" if cached else forwarded
