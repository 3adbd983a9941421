"""The model check before the first step: packed sequences do not affect each other, and log-probs are the model's own.

It takes two short sequences A and B of the run's data, supervises every token, and compares rows that differ in one
respect:

    own       A and B alone, with the model's own forward of each: finds differences in logits, positions and masks
    packed    the second sequence of the rows A B and B A, with the same sequence alone: finds positions that do not
              restart. In a causal model the first sequence can change only by rounding
    before    B after A, with B after other tokens: finds leaks through masks or through a recurrent state
    after     A before B, with A before other tokens: in a causal model it can change only by rounding
    shared    two answers to the first half of A in a row that holds it once, with each after its own copy of it; only
              where the run shares prompts

Rows of the same shape are computed in the same way, so even in bfloat16 a sequence keeps every bit unless there is a
leak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed
from uft_ds.objectives.reference import POLICY_STREAM
from uft_ds.streams.policy import base_of
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import streams_of

LONGEST = 256
"""Number of a sequence's first tokens that are compared. Their logits are all held in memory, in float32."""

Forward = Callable[[MicroBatch, bool], Tensor]
"""(row, whether to use the model's own forward) -> log-probs of the row's supervised tokens, nats."""


class Differences(NamedTuple):
    """Differences in nats per token, as defined in the module's docstring.

    They are maxima over tokens; `packed`, `packed_rounding` and `shared` are root mean squares. `shared` is 0 where the
    run does not share prompts.
    """

    own: float
    packed: float
    packed_rounding: float
    before: float
    after: float
    shared: float = 0.0


class _Allowed(NamedTuple):
    """The largest allowed differences, nats per token."""

    own: float
    packed: float
    before: float


ALLOWED = {
    torch.float32: _Allowed(own=1e-3, packed=1e-4, before=1e-5),
    torch.bfloat16: _Allowed(own=1e-3, packed=0.05, before=1e-5),
}
"""Measured on tiny models of 19 families, float32 and bfloat16: own 1e-6 in both, because no logit is rounded; packed
4e-6 and 0.007; before exactly 0. Measured on SmolLM2-135M with real text in bfloat16: own 3e-5, packed 0.022 (its
rounding 0.009), before 0. Of the models with a fault, LFM2, which leaks least, has `before` at 3e-4 and 2e-3, and OPT's
positions give 0.1."""

ROUNDING = 10
"""A larger difference is allowed up to this multiple of the rounding that is measured where nothing can leak. Kernels
may compute rows of another shape differently, and experts may get other numbers of tokens."""


def check_model(engine: Engine, step: Step, *, dtype: torch.dtype) -> Differences:
    """Refuse a model whose log-probs differ from its own forward's, or whose packed sequences affect each other.

    Every rank must call it, with the same step.

    Returns:
        the measured differences, the maxima over all ranks.
    Raises:
        CheckFailed: on every rank; the message names the model's class, what was found, and what to do.
    """
    name = type(base_of(engine.module.policy)).__name__

    def forward(row: MicroBatch, own: bool) -> Tensor:
        batch = row.to(engine.device)
        outputs = engine(batch, streams_of(engine, with_reference=False), through_logits=own)
        return logps_of(outputs, batch)[POLICY_STREAM]

    with engine.evaluating():
        found = differences(forward, *chosen_of(step), shares_prompts=engine.shares_prompts)
    found = Differences(*map(engine.max_over_ranks, found))  # so all ranks raise, or none
    problem = problem_of(found, dtype)
    if problem is not None:
        raise CheckFailed(f"model.base: {name}: before the first step {problem}")
    return found


def problem_of(found: Differences, dtype: torch.dtype) -> str | None:
    """A sentence about what is wrong with a model; None if nothing is wrong."""
    allowed = ALLOWED[dtype]
    # `not a <= b` instead of `a > b`: it also refuses a NaN.
    if not found.after <= ROUNDING * allowed.packed:
        return (
            f"a sequence's log-probs change by {found.after:.2g} nats a token with the tokens of the sequence after "
            "it: the model is not causal; take one that is"
        )
    may_leak = max(allowed.before, ROUNDING * found.after)
    may_round = max(allowed.packed, ROUNDING * found.packed_rounding)
    if not found.before <= may_leak:
        return (
            f"a sequence's log-probs change by {found.before:.2g} nats a token (allowed {may_leak:.2g}) with the "
            "tokens of the sequence before it in the same row: packed sequences leak into each other, and the gradient "
            "would depend on the packing; take a model of another architecture"
        )
    if not found.packed <= may_round:
        return (
            f"a sequence's log-probs differ by {found.packed:.2g} nats a token (allowed {may_round:.2g}) between a row "
            "of its own and a row that it shares: its positions do not restart with each sequence; take a model of "
            "another architecture"
        )
    if not found.shared <= may_round:
        return (
            f"answers to one prompt differ by {found.shared:.2g} nats a token (allowed {may_round:.2g}) in a row that "
            "holds the prompt once: start the run anew with data.share_prompts: false"
        )
    if not found.own <= allowed.own:
        return (
            f"log-probs differ by {found.own:.2g} nats a token (allowed {allowed.own:.2g}) from the model's own "
            "forward: it changes its logits or positions in a way that is not supported; take a model of another "
            "architecture"
        )
    return None


def chosen_of(step: Step) -> tuple[Sequence, Sequence]:
    """The two shortest sequences of a step, cut to `LONGEST` tokens; a single sequence is used twice."""
    shortest = sorted(step.sequences, key=lambda sequence: sequence.num_tokens)
    second = shortest[min(1, len(shortest) - 1)]
    return token_by_token(shortest[0].token_ids_T), token_by_token(second.token_ids_T)


def differences(forward: Forward, first: Sequence, second: Sequence, *, shares_prompts: bool = False) -> Differences:
    """Measure all differences between two sequences, by seven forwards of rows with one or two sequences.

    Args:
        shares_prompts: whether rows of the run hold a prompt once for several sequences; three forwards more.
    """

    def logps(*sequences: Sequence, own: bool = False, shared: bool = False) -> list[Tensor]:
        logps_N = forward(micro_batch(sequences, share_prompts=shared), own)
        return list(logps_N.split([len(sequence.responses) for sequence in sequences]))

    own = logps(first, second, own=True)
    alone = [*logps(first), *logps(second)]
    packed, turned = logps(first, second), logps(second, first)
    before = logps(_with_other_tokens(first, second), second)
    after = logps(first, _with_other_tokens(second, first))
    answers = _answers(first, second)
    together = logps(*answers, shared=True) if shares_prompts else []
    return Differences(
        own=max(_largest(a, b) for a, b in zip(alone, own, strict=True)),
        packed=max(_typical(packed[1], alone[1]), _typical(turned[1], alone[0])),
        packed_rounding=max(_typical(packed[0], alone[0]), _typical(turned[0], alone[1])),
        before=_largest(before[1], packed[1]),
        after=_largest(after[0], packed[0]),
        shared=max(
            (_typical(one, *logps(answer)) for one, answer in zip(together, answers, strict=False)), default=0.0
        ),
    )


def token_by_token(token_ids_T: np.ndarray, first: int = 1) -> Sequence:
    """The first `LONGEST` tokens of a sequence; each token from `first` on is a response."""
    tokens = token_ids_T[:LONGEST]
    responses = tuple(Response(place, place + 1, 1.0, "instruction") for place in range(first, len(tokens)))
    return Sequence(tokens, responses)


def _answers(first: Sequence, second: Sequence) -> tuple[Sequence, Sequence]:
    """Two sequences that begin with the first half of the first one and go on differently, supervised from there."""
    tokens = first.token_ids_T
    prompt = (len(tokens) + 1) // 2
    ends = (tokens[prompt:], second.token_ids_T)
    one, other = (token_by_token(np.concatenate([tokens[:prompt], end]), first=prompt) for end in ends)
    return one, other


def _with_other_tokens(sequence: Sequence, neighbour: Sequence) -> Sequence:
    """A sequence of the same length with another token at every place, taken from the tokens of the two sequences."""
    known = np.unique(np.concatenate([sequence.token_ids_T, neighbour.token_ids_T]))
    places = np.searchsorted(known, sequence.token_ids_T)
    return token_by_token(known[(places + 1) % len(known)])


def _largest(one_N: Tensor, other_N: Tensor) -> float:
    """The largest absolute difference; infinite if any is NaN."""
    return float((one_N - other_N).abs().nan_to_num(nan=float("inf")).max())


def _typical(one_N: Tensor, other_N: Tensor) -> float:
    """The root mean square of the differences; infinite if any is NaN."""
    return float((one_N - other_N).double().square().nan_to_num(nan=float("inf")).mean().sqrt())
