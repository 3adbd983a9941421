"""What is subtracted from the implicit rewards before they meet the scores: an estimate of c or f(x) of UNA's Eq. 6.

It is without gradient. Where several responses are needed for it, they are those of the whole step: neither the packing
nor the world size plays a part.

    none         r = beta * log_ratio: the paper's choice
    constant     a given number, of rewards
    ema          the running mean of the log-ratios of the steps before this one: BCO (arXiv 2404.04656), exponentially
    kl           max(0, mean log-ratio of mismatched prompts and responses), of this step: KTO (2402.01306)
    prompt_mean  the mean log-ratio of this step's responses to the same prompt, where there are two or more

The last three are in nats (a token, where lengths are normalised), and each response's own beta makes a reward of them:
kinds with other betas share one estimate, each in its own unit, and a beta that changes over the run is no error in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
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
    """The shift of the step after the one whose log-ratios have this mean, nats."""
    return decay * before + (1 - decay) * step_mean


def kl_shift(mismatched_log_ratios: Seq[float]) -> float:
    """KTO's reference point, z0 / beta; 0 where a step has nothing to mismatch, and not a number where one is none."""
    if not len(mismatched_log_ratios):
        return 0.0
    mean = float(np.mean(mismatched_log_ratios))
    return 0.0 if mean < 0 else mean


def mismatched(responses: Seq[tuple[Sequence, Response]]) -> tuple[Sequence, ...]:
    """Each prompt with the next response of the step that answers another one: KTO's y' for each x.

    Joined as tokens, which is exact: a prompt's tokens never depend on what follows it. What would be longer than the
    longest sequence given is left out, for no model need read more.

    Args:
        responses: each with the sequence that it is a span of.
    """
    longest = max((sequence.num_tokens for sequence, _ in responses), default=0)
    prompts = [prompt_of(sequence, response) for sequence, response in responses]
    joined = []
    for place, (sequence, own) in enumerate(responses):
        others = (*range(place + 1, len(responses)), *range(place))
        # A later turn of one's own conversation answers this prompt, too.
        strangers = (i for i in others if prompts[i] != prompts[place] and responses[i][0] is not sequence)
        partner = next(strangers, None)
        if partner is None:
            continue
        other, response = responses[partner]
        tokens = np.concatenate([sequence.token_ids_T[: own.start], other.token_ids_T[response.start : response.end]])
        if len(tokens) <= longest:
            span = replace(response, start=own.start, end=len(tokens), pair_id=None)
            joined.append(Sequence(tokens, (span,)))
    return tuple(joined)


def prompt_of(sequence: Sequence, response: Response) -> bytes:
    """A prompt by its content: all tokens before the response."""
    return hashlib.blake2b(sequence.token_ids_T[: response.start].tobytes(), digest_size=16).digest()


def repeated_prompts(prompts: Seq[bytes], answers: Seq[Hashable]) -> set[bytes]:
    """Those with two different answers or more: the mean over one answer would be its own reward.

    A response that is its own shift is pushed for ever.
    """
    found: dict[bytes, set[Hashable]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        found.setdefault(prompt, set()).add(answer)
    return {prompt for prompt, of_prompt in found.items() if len(of_prompt) > 1}
