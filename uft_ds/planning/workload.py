"""The part of a recipe that decides its hardware needs, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from uft_ds.data.example import KINDS
from uft_ds.data.store.building import RowRules
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.reference import HowReference
from uft_ds.planning.structure import ITEM_BYTES, Lora
from uft_ds.recipe.settings import Settings
from uft_ds.streams.load import attention_implementation
from uft_ds.streams.packed_attention import PACKED
from uft_ds.streams.recompute import Recompute

ExtraForwards = Literal["none", "both_streams", "as_trained"]
"""Additional forwards before a step.

both_streams: the shift `kl` forwards policy and reference, even if the reference is cached. as_trained: `reinforce`
compares all answers of a step, so it forwards the policy, and the reference only if it is not cached. `prompt_mean`,
`center`, `rloo` and `grpo` forward only answers to one prompt that the packing divides; a plan assumes none.
"""


WITHOUT_PAIRS = frozenset(
    {"ultrachat", "alpaca", "sharegpt", "helpsteer2", "ultrafeedback", "kto", "prompts", "recorded"}
)
"""Formats whose rows are never pairs. A format of another package may give pairs."""


@dataclass(frozen=True)
class Workload:
    """The workload of one run."""

    lora: Lora
    dtype: str
    quantization: str | None
    """The recipe's `model.quantization`."""
    attention: str
    gradient_checkpointing: Recompute
    """`true` for a recipe that says `auto`, until `with_chosen_recompute` has chosen."""
    activation_offload: bool
    logits_bytes: int | None
    reference: HowReference
    caches_reference: bool
    tokens_per_micro_batch: int
    """That a rank computes at once."""
    sequence_size: int
    """Number of ranks that compute a row together: it has as many times that."""
    max_length: int
    examples_per_step: int
    tokens_per_response: int
    """Mean number of tokens that a response adds to a step, prompt included."""
    kept_checkpoints: int
    num_responses: int | None
    """Responses in all data, held-out data included, if the recipe states their number."""
    has_pairs: bool
    """Whether the data may hold pairs, whose two responses stay together whatever their loss is."""
    extra_forwards: ExtraForwards
    """Forwards before each step, without a backward."""
    begins_with_forward: bool
    """Whether a forward without backward comes before the first step: checks of the reference, or an evaluation."""

    @property
    def item_bytes(self) -> int:
        """Bytes per element of the base and of the activations."""
        return ITEM_BYTES[self.dtype]

    @property
    def tokens_per_step(self) -> int:
        return self.examples_per_step * self.tokens_per_response

    @property
    def attention_passes(self) -> int:
        """How often a micro-step passes the attention: forward and backward, the reference, and what is recomputed."""
        return 2 + (self.reference in ("lockstep", "separate")) + (self.gradient_checkpointing is not False)

    def extra_streams(self, mode: str) -> int:
        """Additional forwards of each response before the step: 0, 1 (policy) or 2 (policy and reference).

        Args:
            mode: how the step itself gets the reference.
        """
        if self.extra_forwards == "none":
            return 0
        return 1 if self.extra_forwards == "as_trained" and mode == "cached" else 2

    def micro_steps(self, ranks: int) -> int:
        """Micro-steps of a rank in a step, if all responses have the mean length; a response is never split."""
        return -(-self.most_responses(ranks) // self._responses_at_once)

    @property
    def _responses_at_once(self) -> int:
        tokens = self.tokens_per_micro_batch * self.sequence_size
        return max(self.unit, tokens // self.tokens_per_response // self.unit * self.unit)

    def attended_tokens(self, ranks: int) -> int:
        """Keys per query, QK^T and AV together.

        Packed and flash-attention: half of the own sequence for each. Otherwise: the whole micro-batch for each.
        """
        if self.attention in (PACKED, "flash_attention_2"):
            return self.tokens_per_response
        at_once = min(self._responses_at_once, self.most_responses(ranks))
        return 2 * at_once * self.tokens_per_response

    def most_responses(self, ranks: int) -> int:
        """Responses of a step on the rank, or on the ranks that share sequences, with the most responses."""
        return -(-self.examples_per_step // self.unit // max(1, ranks // self.sequence_size)) * self.unit

    @property
    def unit(self) -> int:
        """Number of responses that stay together: 2 for pairs."""
        return 2 if self.has_pairs else 1

    @property
    def least_micro_batch(self) -> int:
        """Smallest possible `tokens_per_micro_batch`: a row must hold the longest unit."""
        return -(-self.unit * self.max_length // self.sequence_size)

    @property
    def largest_row(self) -> int:
        """Largest row in tokens, of all ranks that share it: limited by the recipe and by the size of a step."""
        tokens = self.tokens_per_micro_batch * self.sequence_size
        return min(tokens, max(self.unit, self.examples_per_step) * self.max_length)

    @property
    def largest_micro_batch(self) -> int:
        """Largest number of tokens that a rank computes at once: its part of the largest row."""
        return -(-self.largest_row // self.sequence_size)

    @property
    def lengths_at_once(self) -> tuple[int, ...]:
        """The sequences of the largest row, as long as they may be, in tokens."""
        whole, rest = divmod(self.largest_row, self.max_length)
        return (self.max_length,) * whole + ((rest,) if rest else ())


def workload_of(settings: Settings, config: Any, *, tokens_per_response: int | None) -> Workload:
    """The workload of a run. Without a mean length, each response counts as `data.max_length` tokens.

    Args:
        config: the configuration of the base model.
    Raises:
        UserError: transformers does not have the implementation that `model.attention` names for this model.
    """
    reference, objective = settings.reference, settings.objective
    examples = [
        source.examples and source.examples * (1 if source.asked is None else source.asked.answers)
        for source in (*settings.data.sources, *settings.data.held_out)
    ]
    return Workload(
        lora=_lora_of(settings),
        dtype=settings.model.dtype,
        quantization=settings.model.quantization,
        # For the GPUs of the plan, not for this machine.
        attention=attention_implementation(
            settings.model.attention, getattr(torch, settings.model.dtype), config, has_flash_attention=True
        ),
        gradient_checkpointing=_recompute_of(settings),
        activation_offload=settings.model.activation_offload,
        logits_bytes=settings.model.logits_bytes,
        reference=reference.mode if _forwards_reference(settings) else "none",
        caches_reference=reference.caches,
        tokens_per_micro_batch=settings.train.tokens_per_micro_batch,
        sequence_size=settings.launch.sequence_parallel,
        max_length=settings.data.max_length,
        examples_per_step=settings.train.examples_per_step,
        tokens_per_response=tokens_per_response or settings.data.max_length,
        kept_checkpoints=settings.train.keep_checkpoints + (settings.train.keep_best is not None),
        num_responses=sum(n for n in examples if n) if all(examples) else None,
        has_pairs=any(_may_hold_pairs(source.rules) for source in settings.data.sources),
        extra_forwards=_extra_forwards(objective),
        begins_with_forward=bool(reference.is_needed or settings.data.held_out or settings.start_adapter),
    )


def _forwards_reference(settings: Settings) -> bool:
    """Whether steps forward a reference. That of a base that is trained is computed before the first step, for all
    responses, unless there is a copy of it."""
    return settings.reference.is_needed and (not settings.trains_all or settings.copies_reference)


def _lora_of(settings: Settings) -> Lora:
    if settings.trains_all:
        return Lora.none(settings.model.dtype, copies_base=settings.copies_reference)
    reference, lora = settings.reference, settings.adapters
    return Lora(
        lora.rank,
        lora.alpha,
        lora.targets,
        lora.dtype,
        has_reference=reference.adapter is not None and reference.is_needed,
        has_reward_head=settings.trains_head,
        experts=lora.experts,
    )


def _recompute_of(settings: Settings) -> Recompute:
    stated = settings.model.gradient_checkpointing
    return True if stated == "auto" else stated


def _may_hold_pairs(rules: RowRules) -> bool:
    """Whether a source's rows may be pairs, as far as the recipe tells; a plan does not read them."""
    return not rules.split_pairs and rules.format not in WITHOUT_PAIRS


def _extra_forwards(objective: Objective) -> ExtraForwards:
    """Additional forwards, counted for every response: the recipe does not tell how many responses they are for."""
    if any(objective.policy_gradient(kind) == "reinforce" for kind in KINDS):
        return "as_trained"
    return "both_streams" if objective.shift.name == "kl" and any(map(objective.has_pointwise, KINDS)) else "none"
