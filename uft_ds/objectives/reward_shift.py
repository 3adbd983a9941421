"""The reward shift, subtracted from implicit rewards before they are compared with scores.

It estimates c or f(x) of UNA's (arXiv 2408.15339) Eq. 6 and carries no gradient. If the estimate needs several
responses, they are those of the whole step, so it does not depend on the packing or the world size.

    none         r = beta * log_ratio: the paper's choice
    constant     a given number, in the unit of rewards
    ema          the exponential moving average of the log-ratios of earlier steps: BCO (arXiv 2404.04656)
    kl           max(0, mean log-ratio of mismatched prompts and responses) of this step: KTO (2402.01306)
    prompt_mean  the mean log-ratio of this step's responses to the same prompt, if there are two or more

The last three are in nats (per token if lengths are normalised). All kinds share one estimate in nats; each response
multiplies it by its own beta. So kinds may have different betas, and a beta may change over the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from uft_ds.data.example import Response, Sequence

ShiftName = Literal["none", "constant", "ema", "kl", "prompt_mean"]

Center = Literal["none", "prompt"]
"""prompt: the means over the answers to one prompt are taken off both rewards and scores; see `groups`."""


@dataclass(frozen=True)
class RewardShift:
    """value: the shift of `constant`. decay: for `ema`, the weight of the earlier mean."""

    name: ShiftName = "none"
    value: float = 0.0
    decay: float = 0.9


def next_running_mean(before: float, step_mean: float, decay: float) -> float:
    """The shift of the next step, nats, from this step's shift and its mean log-ratio."""
    return decay * before + (1 - decay) * step_mean


def kl_shift(mismatched_log_ratios: Seq[float]) -> float:
    """KTO's reference point, z0 / beta, nats: 0 without mismatched pairs, NaN if a log-ratio is NaN."""
    if not len(mismatched_log_ratios):
        return 0.0
    mean = float(np.mean(mismatched_log_ratios))
    return 0.0 if mean < 0 else mean  # unlike max(0, mean), this keeps a NaN


def mismatched(responses: Seq[tuple[Sequence, Response]]) -> tuple[Sequence, ...]:
    """Join each prompt with a response of the step that answers another prompt: KTO's y' for each x.

    It is the next one, counted from as many places further as the step has responses to the prompt. Several answers to
    one prompt may follow each other, the good ones first: the next stranger of all would be the same good answer.

    Tokens are concatenated, which is exact because a prompt's tokens never depend on the text after it. A result that
    is longer than the longest given sequence is left out, so that the model never reads a longer one than before.

    Args:
        responses: each with the sequence that contains it.
    """
    longest = max((sequence.num_tokens for sequence, _ in responses), default=0)
    prompts = [prompt_of(sequence, response) for sequence, response in responses]
    answers = Counter(prompts)
    joined = []
    for place, (sequence, own) in enumerate(responses):
        first = place + answers[prompts[place]]
        others = [i % len(responses) for i in range(first, first + len(responses))]  # after the last comes the first
        # Responses of the same conversation are excluded: a later turn of it answers this prompt, too.
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
    """A hash of the prompt's content: all tokens before the response."""
    return hashlib.blake2b(sequence.token_ids_T[: response.start].tobytes(), digest_size=16).digest()


def repeated_prompts(prompts: Seq[bytes], answers: Seq[Hashable]) -> set[bytes]:
    """The prompts that have at least two different answers.

    The mean over a single answer would be the answer's own reward. Its shifted reward would always be 0, so its loss
    would push it without end.
    """
    found: dict[bytes, set[Hashable]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        found.setdefault(prompt, set()).add(answer)
    return {prompt for prompt, of_prompt in found.items() if len(of_prompt) > 1}
