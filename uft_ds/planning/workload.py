"""What a recipe asks of the hardware, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from uft_ds.data.example import KINDS
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.pairwise import PAIR_LOSSES
from uft_ds.objectives.reference import HowReference
from uft_ds.planning.structure import ITEM_BYTES, Lora
from uft_ds.recipe.settings import Settings
from uft_ds.streams.load import attention_implementation

ExtraForwards = Literal["none", "both_streams", "as_trained"]
"""both_streams: `reward_shift: kl`, whatever is cached. as_trained: `prompt_mean`, the reference where not cached."""


@dataclass(frozen=True)
class Workload:
    """Of one run."""

    lora: Lora
    dtype: str
    attention: str
    gradient_checkpointing: bool
    activation_offload: bool
    logits_bytes: int | None
    reference: HowReference
    caches_reference: bool
    tokens_per_micro_batch: int
    max_length: int
    examples_per_step: int
    tokens_per_response: int
    """Mean, prompt included: what a response adds to the tokens of a step."""
    kept_checkpoints: int
    num_responses: int | None
    """Of the whole data, where the recipe says it."""
    has_pairs: bool
    """Whether losses of pairs are asked for, whose sides are kept together."""
    extra_forwards: ExtraForwards
    """What a reward shift forwards before each step, without a backward."""
    begins_with_forward: bool
    """Whether a forward without backward comes before the first step: checks of the reference, or an evaluation."""

    @property
    def item_bytes(self) -> int:
        """Of one number of the base and of the activations."""
        return ITEM_BYTES[self.dtype]

    @property
    def tokens_per_step(self) -> int:
        return self.examples_per_step * self.tokens_per_response

    def extra_streams(self, mode: str) -> int:
        """Forwards ahead of a step's own for each response: of the policy, of both, or none.

        Args:
            mode: how the reference is had in the step itself: `cached`, or forwarded.
        """
        if self.extra_forwards == "none":
            return 0
        return 1 if self.extra_forwards == "as_trained" and mode == "cached" else 2

    def micro_steps(self, ranks: int) -> int:
        """Forwards and backwards of a rank in a step, of responses as long as the mean; none of them is cut."""
        return -(-self.most_responses(ranks) // self._responses_at_once)

    @property
    def _responses_at_once(self) -> int:
        return max(self.unit, self.tokens_per_micro_batch // self.tokens_per_response // self.unit * self.unit)

    def attended_tokens(self, ranks: int) -> int:
        """By how many keys a query is multiplied in QK^T and in AV, together: under flash-attention half of its own
        sequence's each, else all of its micro-batch's."""
        if self.attention == "flash_attention_2":
            return self.tokens_per_response
        at_once = min(self._responses_at_once, self.most_responses(ranks))
        return 2 * at_once * self.tokens_per_response

    def most_responses(self, ranks: int) -> int:
        """Of a step, on the rank that has most of them."""
        return -(-self.examples_per_step // self.unit // ranks) * self.unit

    @property
    def unit(self) -> int:
        """Responses that stay together: the sides of a pair do."""
        return 2 if self.has_pairs else 1

    @property
    def least_micro_batch(self) -> int:
        """Tokens: the longest unit must go in."""
        return self.unit * self.max_length

    @property
    def largest_micro_batch(self) -> int:
        """Tokens: no more than the recipe allows, and than a step can hold."""
        return min(self.tokens_per_micro_batch, max(self.unit, self.examples_per_step) * self.max_length)


def workload_of(settings: Settings, config: Any, *, tokens_per_response: int | None) -> Workload:
    """Of a run; without a mean length, each response is taken for `data.max_length` tokens long.

    Args:
        config: the base's.
    Raises:
        UserError: `model.attention` names what transformers does not have for this model.
    """
    reference, objective, sources = settings.reference, settings.objective, settings.data.sources
    examples = [source.examples for source in sources]
    return Workload(
        lora=Lora(
            settings.lora.rank,
            settings.lora.alpha,
            settings.lora.targets,
            settings.lora.dtype,
            has_reference=reference.adapter is not None and reference.is_needed,
        ),
        dtype=settings.model.dtype,
        # On the GPUs that are planned for, whatever this machine has.
        attention=attention_implementation(
            settings.model.attention, getattr(torch, settings.model.dtype), config, has_flash_attention=True
        ),
        gradient_checkpointing=settings.model.gradient_checkpointing,
        activation_offload=settings.model.activation_offload,
        logits_bytes=settings.model.logits_bytes,
        reference=reference.mode if reference.is_needed else "none",
        caches_reference=reference.caches,
        tokens_per_micro_batch=settings.train.tokens_per_micro_batch,
        max_length=settings.data.max_length,
        examples_per_step=settings.train.examples_per_step,
        tokens_per_response=tokens_per_response or settings.data.max_length,
        kept_checkpoints=settings.train.keep_checkpoints + (settings.train.keep_best is not None),
        num_responses=sum(n for n in examples if n) if all(examples) else None,
        has_pairs=any(loss in PAIR_LOSSES for loss in objective.losses)
        and any(not source.rules.split_pairs for source in sources),
        extra_forwards=_extra_forwards(objective),
        begins_with_forward=reference.is_needed or bool(settings.data.held_out),
    )


def _extra_forwards(objective: Objective) -> ExtraForwards:
    """Of every response: a step may hold fewer that a shift moves, which a recipe alone does not say."""
    if not any(objective.has_pointwise(kind) for kind in KINDS):
        return "none"
    return {"kl": "both_streams", "prompt_mean": "as_trained"}.get(objective.shift.name, "none")  # type: ignore[return-value]
