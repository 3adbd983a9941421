"""Divide a step's sequences over ranks and micro-steps by bin packing (`bins`).

The result has few micro-steps, and the ranks wait little for each other. There are U units (a sequence, the two sides
of a pair, or the answers to one prompt that share it) and B bins, one for each rank and micro-step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from uft_ds.data.bins import Units, assign, even_out, fewest_micro_steps, schedule, sums
from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.prompts import by_prompt, tokens_of


@dataclass(frozen=True)
class Packing:
    """How the sequences of a step are divided.

    attention_parity: length in tokens at which a sequence's attention costs as much as the rest of the model. A
    sequence of T tokens costs T + T^2 / attention_parity.
    share_prompts: whether a prompt that several sequences of a micro-batch begin with is forwarded once.
    sequence_size: number of ranks that compute a micro-batch together, each a part of every row.
    """

    attention_parity: float = math.inf
    share_prompts: bool = False
    sequence_size: int = 1


UNSHARED = Packing()
"""Each sequence for itself, costs by tokens alone."""


def pack(
    step: Step, *, tokens_per_micro_batch: int, world_size: int, packing: Packing = UNSHARED
) -> list[list[list[Sequence]]]:
    """Divide a step's sequences: result[rank][micro_step] is a list of sequences, maybe empty.

    Every rank gets the same, small number of micro-steps. Costs are then made equal in each micro-step and over the
    step. The sides of a pair stay together. Every rank computes the same result.

    Raises:
        ValueError: a sequence or a pair is longer than `tokens_per_micro_batch`, a pair with both copies of its prompt,
            as it is checked when data is prepared.
    """
    units = _units(step.sequences, packing.attention_parity)
    _check_fits(units, tokens_per_micro_batch)
    if packing.share_prompts:
        units = _with_shared_prompts(
            units, step.sequences, packing.attention_parity, tokens_per_micro_batch, world_size
        )
    micro_steps = fewest_micro_steps(units.tokens_U.tolist(), tokens_per_micro_batch, world_size)
    # The bound may be too low, and the heuristics may fail where a packing exists: then one micro-step more is tried.
    while (bin_of_U := assign(units, micro_steps * world_size, tokens_per_micro_batch)) is None:
        micro_steps += 1
    # The number of micro-steps is fixed now; only the balance changes from here on.
    bin_of_U = even_out(units, bin_of_U, micro_steps, world_size, tokens_per_micro_batch)
    bins: list[list[Sequence]] = [[] for _ in range(micro_steps * world_size)]
    for members, number in zip(units.members, bin_of_U.tolist(), strict=True):
        bins[number] += [step.sequences[i] for i in members]
    cost_B = sums(units.costs_U, bin_of_U, len(bins))
    return [[bins[number] for number in of_rank] for of_rank in schedule(cost_B, world_size).T.tolist()]


def rank_micro_batches(
    step: Step,
    *,
    tokens_per_micro_batch: int,
    rank: int,
    world_size: int,
    packing: Packing = UNSHARED,
) -> list[MicroBatch]:
    """The micro-batches of one rank; every rank gets the same number."""
    bins = pack(step, tokens_per_micro_batch=tokens_per_micro_batch, world_size=world_size, packing=packing)
    return [micro_batch(sequences, share_prompts=packing.share_prompts) for sequences in bins[rank]]


_COST_OF_A_TOKEN = 256
"""The cost of one token without attention. Costs are rounded to whole numbers; this scale keeps the rounding small."""


def cost_of(num_tokens: int, attention_parity: float) -> int:
    """The cost of one sequence, in 1/256 of a token without attention."""
    return round(_COST_OF_A_TOKEN * (num_tokens + num_tokens * num_tokens / attention_parity))


def _units(sequences: Seq[Sequence], attention_parity: float) -> Units:
    members: dict[tuple[str, int], list[int]] = {}
    # Two namespaces: the index of a single sequence may equal the id of a pair.
    for i, sequence in enumerate(sequences):
        pair_id = sequence.pair_id
        members.setdefault(("alone", i) if pair_id is None else ("pair", pair_id), []).append(i)
    lengths = [[sequences[i].num_tokens for i in unit] for unit in members.values()]
    return Units(
        list(members.values()),
        np.array([sum(unit) for unit in lengths], dtype=np.int64),
        np.array([sum(cost_of(length, attention_parity) for length in unit) for unit in lengths], dtype=np.int64),
    )


def _with_shared_prompts(
    units: Units, sequences: Seq[Sequence], attention_parity: float, capacity: int, world_size: int
) -> Units:
    """The units, those with one prompt joined as far as a micro-batch and a rank's share of the step hold them."""
    groups = by_prompt(sequences)
    prompt_of = {i: number for number, members in enumerate(groups) for i in members}
    most = min(
        capacity, -(-tokens_of(sequences, groups) // world_size)
    )  # a larger group would leave other ranks without work
    joined: list[list[int]] = []
    tokens: list[int] = []
    costs: list[int] = []
    growing: dict[int, int] = {}  # by prompt, the place in `joined` of the group that may take another unit
    for members, own_tokens, own_cost in zip(
        units.members, units.tokens_U.tolist(), units.costs_U.tolist(), strict=True
    ):
        prompts = {prompt_of[i] for i in members}
        shared = sequences[members[0]].prompt_tokens if len(prompts) == 1 else 0
        # Of a sequence's cost, what its prompt costs is saved wherever the prompt is in the row already.
        saved, saved_cost = (len(members) - 1) * shared, (len(members) - 1) * cost_of(shared, attention_parity)
        place = growing.get(min(prompts)) if shared else None
        if place is not None and tokens[place] + own_tokens - saved - shared <= most:
            joined[place] = joined[place] + members
            tokens[place] += own_tokens - saved - shared
            costs[place] += own_cost - saved_cost - cost_of(shared, attention_parity)
            continue
        if shared:
            growing[min(prompts)] = len(joined)
        joined.append(members)
        tokens.append(own_tokens - saved)
        costs.append(own_cost - saved_cost)
    return Units(joined, np.array(tokens, dtype=np.int64), np.array(costs, dtype=np.int64))


def _check_fits(units: Units, capacity: int) -> None:
    for members, tokens in zip(units.members, units.tokens_U.tolist(), strict=True):
        if tokens > capacity:
            what = "pair" if len(members) == 2 else "sequence"
            raise ValueError(f"a {what} of {tokens} tokens exceeds tokens_per_micro_batch {capacity}")
