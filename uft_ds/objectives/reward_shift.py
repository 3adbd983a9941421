"""What is subtracted from the implicit rewards before they meet the scores: an estimate of c or f(x) of UNA's Eq. 6.

It is a number, without gradient. Where several responses are needed for it, they are those of the whole step: neither
the packing nor the world size plays a part.

    none         r = beta * log_ratio: the paper's choice
    constant     a given number
    ema          the running mean of the rewards of the steps before this one: BCO (arXiv 2404.04656), exponentially
    kl           max(0, mean reward of mismatched prompts and responses), of this step: KTO (2402.01306)
    prompt_mean  the mean reward of this step's responses to the same prompt, where there are two or more
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from uft_ds.data.example import Response, Sequence

ShiftName = Literal["none", "constant", "ema", "kl", "prompt_mean"]


@dataclass(frozen=True)
class RewardShift:
    """value: of `constant`. decay: of `ema`, the weight of what was before."""

    name: ShiftName = "none"
    value: float = 0.0
    decay: float = 0.9


def next_running_mean(before: float, step_mean: float, decay: float) -> float:
    """The shift of the step after the one whose rewards have this mean."""
    return decay * before + (1 - decay) * step_mean


def kl_shift(mismatched_rewards: Seq[float]) -> float:
    """KTO's reference point z0; 0 where a step has nothing to mismatch."""
    return max(0.0, float(np.mean(mismatched_rewards))) if len(mismatched_rewards) else 0.0


def mismatched(responses: Seq[tuple[Sequence, Response]], *, longest: int) -> tuple[Sequence, ...]:
    """Each prompt with the response that follows the next one, in the order of the step: KTO's y' for each x.

    Joined as tokens, which is exact: a prompt's tokens never depend on what follows it.

    Args:
        responses: each with the sequence that it is a span of.
        longest: tokens; what would be longer is left out.
    """
    if len(responses) < 2:
        return ()
    joined = []
    for (sequence, own), (other, response) in zip(responses, (*responses[1:], responses[0]), strict=True):
        tokens = np.concatenate([sequence.token_ids_T[: own.start], other.token_ids_T[response.start : response.end]])
        if len(tokens) <= longest:
            span = Response(own.start, len(tokens), response.score, response.kind, response.origin)
            joined.append(Sequence(tokens, (span,)))
    return tuple(joined)


def prompt_of(sequence: Sequence, response: Response) -> bytes:
    """A prompt by its content: all tokens before the response."""
    return hashlib.blake2b(sequence.token_ids_T[: response.start].tobytes(), digest_size=16).digest()


def prompt_means(prompts: Seq[Hashable], rewards: Seq[float]) -> list[float]:
    """The shift of each response: the mean over those of its prompt, or 0 where it is alone.

    Alone it would be its own shift, and be pushed for ever.
    """
    members: dict[Hashable, list[float]] = {}
    for prompt, reward in zip(prompts, rewards, strict=True):
        members.setdefault(prompt, []).append(reward)
    means = {prompt: float(np.mean(found)) if len(found) > 1 else 0.0 for prompt, found in members.items()}
    return [means[prompt] for prompt in prompts]
