"""Make a plan from a recipe and a cluster: memory, traffic, the least time of a step, and alternatives.

Nothing is allocated, launched or downloaded. Every alternative is planned in the same way as the recipe itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.planning.alternatives import FOR_CPU, Alternative, combination_for, remedies_for, shipped_files
from uft_ds.planning.amount import Amount, amount_of
from uft_ds.planning.compute import mfu_flops
from uft_ds.planning.duration import Duration, Mfu, duration_of, mfu_of
from uft_ds.planning.hardware import Cluster
from uft_ds.planning.memory import Disk, disk
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.recompute import fastest_that_fits, fits_gpu
from uft_ds.planning.shapes import model_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.structure import Structure
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.settings import Settings
from uft_ds.streams.accept import check_config, check_forwarded
from uft_ds.streams.packed_attention import PACKED


@dataclass(frozen=True)
class Plan:
    """Everything that `uft plan` reports."""

    recipe_name: str
    structure: Structure
    outcome: Outcome
    disk: Disk
    files: tuple[Alternative, ...]
    """The recipe's file and every file of `ds_configs/`, the best one first."""
    remedies: tuple[Alternative, ...]
    """Single changes: those that fit, the cheapest first, then the others; empty if the recipe fits."""
    combination: Alternative | None
    """Several changes that fit together, if no single remedy on the given GPUs is as cheap; with more GPUs only if no
    remedy fits at all."""
    mfu_flops: int
    amount: Amount | None
    mfu: Mfu
    assumptions: tuple[str, ...]

    @property
    def answer(self) -> Alternative | None:
        """What to take: the cheapest alternative that fits, on the given GPUs if any does; None if nothing fits.

        If the recipe fits, this is the recipe itself or, where a step is then shorter, another file.
        """
        if self.outcome.fits:
            return self.best_file or Alternative((), self.outcome)
        return self.options[0] if self.options and self.options[0].outcome.fits else None

    @property
    def runs(self) -> Outcome:
        """What the time of a run is of: the recipe, or the answer if the recipe does not fit."""
        return self.outcome if self.outcome.fits or self.answer is None else self.answer.outcome

    @property
    def duration(self) -> Duration:
        """How long a run takes."""
        return duration_of(self.runs, self.structure, self.amount, self.mfu)

    @property
    def options(self) -> tuple[Alternative, ...]:
        """What may be changed if the recipe does not fit: single changes, and the combination, which if there is one is
        cheaper than each single change or the only one that fits."""
        return self.remedies if self.combination is None else (self.combination, *self.remedies)

    @property
    def best_file(self) -> Alternative | None:
        """The recommended file; None if no file for GPUs fits."""
        fitting = (file for file in self.files if file.outcome.fits)
        return next((file for file in fitting if file.outcome.setting.deepspeed != FOR_CPU), None)


def make_plan(
    settings: Settings,
    cluster: Cluster,
    *,
    tokens_per_response: int | None = None,
    mfu: float | None = None,
    planner: Planner | None = None,
) -> Plan:
    """Plan a run.

    Args:
        tokens_per_response: mean, prompt included; None: that of the data if the token cache has it, otherwise
            `data.max_length`, the largest possible value.
        mfu: the share of the peak FLOP/s to forecast with; None: measured by the run in the output folder, or assumed.
        planner: of the same base, if several plans of it are made: what it has measured is not measured again.
    Raises:
        UserError: the model's config is not available, training would refuse the recipe for it (`streams.accept`), or
            a number is out of its range.
    """
    config, source = model_config(settings.model.base, settings.model.revision)
    name = settings.deepspeed.name
    settings = with_deepspeed_file(settings)
    check_config(settings, config, has_flash_attention=True)  # of the plan's GPUs, not of this machine
    if tokens_per_response is not None and tokens_per_response > settings.data.max_length:
        raise UserError(
            f"--tokens-per-response: {tokens_per_response} given, at most data.max_length {settings.data.max_length}"
        )
    utilization, amount = mfu_of(settings, mfu), amount_of(settings)
    length = tokens_per_response or (None if amount is None else amount.tokens_per_response)
    workload = workload_of(settings, config, tokens_per_response=length)
    planner = planner or Planner(config)
    structure = planner.structure(workload)
    check_forwarded(settings, structure.sample)
    setting = Setting(workload, name, sharding_of(settings.deepspeed.checked), cluster)
    chosen = partial(_chosen, planner) if settings.model.gradient_checkpointing == "auto" else None
    setting = setting if chosen is None else chosen(setting)
    outcome = planner.plan(setting)
    files = shipped_files(planner, setting, chosen)
    remedies = () if outcome.fits else tuple(remedies_for(planner, outcome, files))
    return Plan(
        recipe_name=settings.name,
        structure=structure,
        outcome=outcome,
        disk=disk(structure, workload),
        files=files,
        remedies=remedies,
        combination=None if outcome.fits else combination_for(planner, outcome, remedies),
        mfu_flops=mfu_flops(structure, workload, with_reference=outcome.mode != "cached"),
        amount=amount,
        mfu=utilization,
        assumptions=tuple(
            _assumptions(settings, setting, source, length_from(tokens_per_response, amount), utilization)
        ),
    )


def _chosen(planner: Planner, setting: Setting) -> Setting:
    """With the mode that `model.gradient_checkpointing: auto` takes."""
    return fastest_that_fits(planner, setting, fits_gpu)


def length_from(given: int | None, amount: Amount | None) -> str:
    """Where the mean length of a response is from."""
    if given is not None:
        return "as given"
    if amount is not None and amount.tokens is not None:
        return "the mean of the data in the token cache"
    return "data.max_length (--tokens-per-response gives the mean)"


def _assumptions(settings: Settings, setting: Setting, source: str, length_is: str, mfu: Mfu) -> Iterable[str]:
    workload, cluster = setting.workload, setting.cluster
    yield f"{settings.model.base}: {source}"
    length = f"{workload.tokens_per_response} tokens a response, {length_is}"
    steps = workload.micro_steps(cluster.ranks)
    yield (
        f"{length}: {workload.tokens_per_step} tokens a step, {steps} micro-step{'s' * (steps > 1)} a rank; "
        "every token supervised"
    )
    if settings.is_online:
        yield (
            "online: answers and their scores are made before each step; their time and the generator's memory are not "
            "in these figures"
        )
    if settings.copies_reference:
        where = "in page-locked host memory" if setting.sharding.shards_weights else "whole on each GPU"
        yield f"the reference is a frozen copy of the base, {where}"
    elif settings.trains_all and settings.reference.is_needed:
        yield (
            "before the first step the reference is computed, a forward of all responses that the cache does not hold; "
            "it is not in the figures of a step"
        )
    if workload.quantization is not None:
        yield (
            f"model.quantization: {workload.quantization}: each weight is decoded for each product, which is memory's "
            "work and in no figure of time"
        )
    if workload.extra_forwards != "none":
        of = "reward_shift: kl" if workload.extra_forwards == "both_streams" else "loss: reinforce"
        yield f"objective.{of}: every response is forwarded ahead of its step"
    if workload.dtype == "float32":
        yield "float32: compute at the data sheet's bfloat16 figure unless --tflops says otherwise: it is far slower"
    if workload.attention not in (PACKED, "flash_attention_2"):
        yield f"{workload.attention}: every token of a micro-batch attends to all of it, which a mask then hides"
    elif settings.model.attention == "auto" and workload.attention != PACKED:
        yield "flash-attention 2 is installed on the GPUs (model.attention: auto takes sdpa or eager otherwise)"
    if settings.model.gradient_checkpointing == "auto":
        yield f"model.gradient_checkpointing: auto takes {str(workload.gradient_checkpointing).lower()} on these GPUs"
    yield "2 GB of a GPU for CUDA and NCCL, 5% for fragmentation; 4 GB of host memory a rank"
    yield (
        "least times: everything at the data sheet's figure, perfectly overlapped: for responses of this length a "
        "lower bound; times of a run are of its steps alone, without evaluations, checkpoints and the start"
    )
    if mfu.origin == "assumed":
        yield f"an MFU of {mfu.value:.2f} is no measurement: --mfu gives that of a short run (its metric mfu)"
    elif mfu.origin == "measured":
        yield f"an MFU of {mfu.value:.2f} is the median of the steps of {mfu.run}, whatever GPUs that run had"
