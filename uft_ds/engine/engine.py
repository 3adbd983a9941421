"""The only module, with `checkpoint/`, that knows DeepSpeed.

It turns the recipe's plain values into a DeepSpeed config, shards the model, and keeps the scale of the gradient
exact: a step's gradient is that of sum(terms) / number of terms, whatever the ranks and micro-batches.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import rank_micro_batches
from uft_ds.engine import gradients
from uft_ds.engine.groups import ParameterGroup, check_groups, one_group, optimizer_groups, rates_of
from uft_ds.engine.ranks import Ranks, current_ranks
from uft_ds.engine.zero_section import check_zero_section
from uft_ds.errors import UserError
from uft_ds.host.process import returning_freed_memory
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import Output, Stream

T = TypeVar("T")

OWNED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
}
"""Decided by the recipe; a DeepSpeed file may leave them out or say "auto"."""

FREE_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "aio",
}


@dataclass(frozen=True)
class StepResult:
    """What became of an optimiser step.

    grad_norm: before clipping; not finite where the gradient is not. loss: summed over ranks and micro-batches.
    """

    grad_norm: float
    skipped: bool
    loss: float


def read_deepspeed_file(name_or_path: str) -> dict[str, Any]:
    """A file of ds_configs/ by name, or a DeepSpeed JSON by path.

    DeepSpeed ignores a misspelt key at the top level, so the keys are checked here.

    Raises:
        UserError: no such file, not JSON, an unknown key, or one that the recipe decides.
    """
    path = _deepspeed_path(name_or_path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {path}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed: {path}: expected a JSON object, found {type(config).__name__}")
    for key, value in config.items():
        if key in OWNED_KEYS and not _leaves_it_to_the_recipe(value):
            raise UserError(f'deepspeed: {path}: {key}: the recipe decides it; leave it out or give "auto"')
        if key not in OWNED_KEYS | FREE_KEYS:
            near = difflib.get_close_matches(key, FREE_KEYS | OWNED_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(FREE_KEYS))}"
            raise UserError(f"deepspeed: {path}: unknown key {key!r}; {hint}")
    check_zero_section(config.get("zero_optimization"), path)
    return dict(config)


def _leaves_it_to_the_recipe(value: Any) -> bool:
    """`"auto"`, or a section of nothing else: Hugging Face's own programs fill `{"enabled": "auto"}`."""
    if isinstance(value, dict):
        return all(map(_leaves_it_to_the_recipe, value.values()))
    return bool(value == "auto")


def deepspeed_files() -> dict[str, Path]:
    """The files of ds_configs/ by name."""
    packaged = Path(str(resources.files("uft_ds"))) / "ds_configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "ds_configs"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def _deepspeed_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".json"):
        return Path(name_or_path).expanduser()
    files = deepspeed_files()
    if name_or_path not in files:
        names = ", ".join(files)
        raise UserError(f"deepspeed: no file named {name_or_path!r} in ds_configs; there are: {names}; or give a path")
    return files[name_or_path]


def deepspeed_config(file: dict[str, Any], *, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
    """A DeepSpeed file with everything filled in that the recipe decides."""
    return {
        **{key: value for key, value in file.items() if key not in OWNED_KEYS},
        # One packed row a forward; steps hold a varying number of them, so accumulation is driven by hand.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # By itself DeepSpeed rounds the gradients of float32 adapters on a bfloat16 base before it adds them up.
        "communication_data_type": "fp32",
        # torch's AdamW also where the optimiser is offloaded: a LoRA's is small, and nothing is compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": file.get("steps_per_print", 2**31),
    }


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Within the block, transformers hands each rank its shard of the weights only, under ZeRO-3."""
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)
    with returning_freed_memory():
        yield
    del keep_alive


class Engine:
    """A sharded model, its optimiser, and the exact scale of the gradient."""

    def __init__(
        self,
        model: UFTModel,
        config: dict[str, Any],
        *,
        layer_class: type | None,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        attention_parity: float = math.inf,
        collective_timeout_minutes: float = 30.0,
        groups: Seq[ParameterGroup] | None = None,
    ) -> None:
        """
        Args:
            groups: that divide what is trained, each with a learning rate of its own; None: one group of all.
        Raises:
            ValueError: groups that do not. UserError: DeepSpeed would train in another dtype.
        """
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        if config["zero_optimization"]["stage"] == 3 and layer_class is not None:
            # A leaf is gathered whole, adapters included: one collective a layer, the same with adapters off.
            set_z3_leaf_modules(model, [layer_class])
        self._groups = one_group(model) if groups is None else tuple(groups)
        check_groups(self._groups, model)
        trainable = [parameter for group in self._groups for parameter in group.parameters]
        dtypes = {parameter.dtype for parameter in trainable}
        optimizer = torch.optim.AdamW(optimizer_groups(self._groups), lr=0.0, betas=betas, weight_decay=weight_decay)
        self.streams: Mapping[str, Stream] = model.streams
        """What this model can forward, by name."""
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # For small facts of the hosts: over NCCL they would wait for the GPU's queue.
        self._hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=collective_timeout_minutes))
        self._attention_parity = attention_parity
        self._ranks = current_ranks()
        if {parameter.dtype for parameter in trainable} != dtypes:
            raise UserError(
                "lora.dtype: DeepSpeed would train the adapters in the model's dtype at this ZeRO stage; "
                "take ZeRO-3 or lora.dtype: bfloat16"
            )

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self._engine.module

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, for `checkpoint/` alone."""
        return self._engine

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def ranks(self) -> Ranks:
        """This rank's place by role."""
        return self._ranks

    @property
    def rank(self) -> int:
        """Among all ranks."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """All ranks, whatever their role."""
        return self._ranks.world_size

    def __call__(
        self, micro_batch: MicroBatch, streams: Seq[Stream], *, through_logits: bool = False
    ) -> dict[str, Output]:
        """Forward one micro-batch, in one visit of the weights: what each stream makes of it, by the stream's name.

        Every rank must call it the same number of times, with the same streams and options.

        Args:
            streams: of `self.streams`.
            through_logits: one stream by Hugging Face's own forward; for the check at the start.
        """
        outputs: dict[str, Output] = self._engine(micro_batch, streams, through_logits=through_logits)
        return outputs

    def micro_batches(self, step: Step, tokens_per_micro_batch: int) -> list[MicroBatch]:
        """This rank's part of a step, on its device; the same number on every rank."""
        batches = rank_micro_batches(
            step,
            tokens_per_micro_batch=tokens_per_micro_batch,
            rank=self._ranks.data_rank,
            world_size=self._ranks.data_size,
            attention_parity=self._attention_parity,
        )
        return [batch.to(self.device) for batch in batches]

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss, exactly.

        DeepSpeed averages over data ranks, so the share is multiplied by their number; gradients are reduced as they
        come, and the last micro-batch of the step says so before its backward.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._ranks.loss_factor, scale_wrt_gas=False)

    def step(self, rates: float | Mapping[str, float], loss: Tensor | None = None) -> StepResult:
        """Clip and update; with a non-finite loss or gradient on any rank nothing moves on any of them.

        Gradients are clipped by the norm over all groups. The ranks agree on what is finite before DeepSpeed's step:
        some of its releases apply a gradient that is NaN (0.19.5 to 0.19.7 under ZeRO-3), and none of them sees the
        loss.

        Args:
            rates: the run's learning rate, which each group of parameters scales, or each group's own by name.
            loss: this rank's share of the step's loss, summed over its micro-batches, on its device.
        Raises:
            ValueError: a group without a rate, or a rate without a group.
        """
        rate_of = rates_of(self._groups, rates)
        optimizer = self._engine.optimizer
        own_loss = torch.zeros((), device=self.device) if loss is None else loss.detach()
        # A sum is not finite as soon as one of its terms is not, and a NaN times 0 is NaN: every rank has its say, each
        # data rank's loss is counted once. Reading it waits for the device, once a step and where DeepSpeed's step
        # would wait for its own norm next.
        counted_loss = own_loss.double() * float(self._ranks.counts)
        sums = torch.stack([counted_loss, gradients.squared_norm(optimizer).to(self.device)])
        torch.distributed.all_reduce(sums)
        total_loss, squared_norm = sums.tolist()
        if not math.isfinite(total_loss) or not math.isfinite(squared_norm):
            gradients.drop(optimizer)
            return StepResult(math.sqrt(squared_norm), skipped=True, loss=total_loss)
        for group in optimizer.param_groups:
            group["lr"] = rate_of[group["name"]]
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped=not math.isfinite(norm), loss=total_loss)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum of a tensor over data ranks, on every rank."""
        total = values.detach().clone().to(self.device)
        if not self._ranks.counts:
            total.zero_()
        torch.distributed.all_reduce(total)
        return total

    def max_over_ranks(self, value: float) -> float:
        """The largest of a number over all ranks; infinite where one is NaN."""
        # MAX drops a NaN, where it should win.
        largest = torch.tensor([float("inf") if math.isnan(value) else value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return float(largest)

    def agree(self, value: int) -> int:
        """The largest of a number over all ranks, by their hosts alone."""
        largest = torch.tensor([value])
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self._hosts)
        return int(largest)

    def gather_objects(self, value: T) -> list[T]:
        """A small value of every rank, by rank, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def gather_over_data(self, value: T) -> list[T]:
        """A small value of every data rank, by data rank, on every rank."""
        return self.gather_objects(value)[:: self._ranks.sequence_size]

    @contextmanager
    def gathered_trainable(self) -> Iterator[dict[str, Tensor]]:
        """The trainable parameters, whole, by name; frozen ones are never gathered."""
        import deepspeed

        # A forward without a backward leaves prefetched parameters in flight, which cannot be gathered again.
        # The optimiser's own, for the engine's also collects Python's garbage, which takes longer than all the rest.
        if hasattr(self._engine.optimizer, "empty_partition_cache"):
            self._engine.optimizer.empty_partition_cache()
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(named.values())):
            yield {name: parameter.detach() for name, parameter in named.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients, in evaluation mode."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()
