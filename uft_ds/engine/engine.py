"""The engine: a model sharded by DeepSpeed, which only `engine/`, `export/` and `doctor/` know.

It turns the recipe's plain values into a DeepSpeed config, shards the model, and keeps the scale of the gradient
exact: a step's gradient is that of sum(terms) / number of terms, for any number of ranks and micro-batches.
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
"""Keys that the recipe decides. A DeepSpeed file may omit them or set them to "auto"."""

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
"""Keys that a DeepSpeed file may set; they are passed on unchanged."""
_SECTIONS = {"comms_logger", "flops_profiler", "aio"}


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimiser step.

    grad_norm: before clipping; not finite if the gradient is not finite.
    skipped: whether the weights were left unchanged.
    loss: summed over ranks and micro-batches.
    """

    grad_norm: float
    skipped: bool
    loss: float


def read_deepspeed_file(name_or_path: str) -> dict[str, Any]:
    """Read a file of ds_configs/ by its name, or a DeepSpeed JSON file by its path.

    DeepSpeed ignores a misspelt key at the top level, so the keys are checked here.

    Raises:
        UserError: the file does not exist or is not JSON, or it sets a key twice, an unknown one, or one that the
            recipe decides.
    """
    path = _deepspeed_path(name_or_path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("not a regular file")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubled_keys)
    except (OSError, ValueError, RecursionError) as error:
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
        expected = _expected_of(key, value)
        if expected is not None:
            raise UserError(f"deepspeed: {path}: {key}: {value!r} found, expected {expected}")
    check_zero_section(config.get("zero_optimization"), path)
    return dict(config)


def _expected_of(key: str, value: Any) -> str | None:
    """What a free key's value should be; None if it is that. DeepSpeed reads them when the ranks already run."""
    if key in OWNED_KEYS or key == "zero_optimization":
        return None
    if key in _SECTIONS:
        return None if isinstance(value, dict) else "an object"
    if key == "steps_per_print":
        is_number = value is None or (type(value) in (int, float) and value >= 1)
        return None if is_number else "a number of at least 1, or null"
    return None if isinstance(value, bool) else "true or false"


def _without_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python's reader takes the last of two equal keys without a word.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found


def _leaves_it_to_the_recipe(value: Any) -> bool:
    """Whether a value is `"auto"`, or a section of only such values: Hugging Face's files say `{"enabled": "auto"}`."""
    if isinstance(value, dict):
        return all(map(_leaves_it_to_the_recipe, value.values()))
    return bool(value == "auto")


def deepspeed_files() -> dict[str, Path]:
    """The paths of the files of ds_configs/, by name."""
    # An installed package holds the folder; in a source checkout it lies beside the package.
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
    """A complete DeepSpeed config: the file's values, and the values that the recipe decides."""
    return {
        **{key: value for key, value in file.items() if key not in OWNED_KEYS},
        # A forward takes one packed row. The number of rows varies by step, so `Engine.backward` sets the accumulation
        # boundary itself, and DeepSpeed must not divide by a fixed number of micro-steps.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # By default DeepSpeed reduces the gradients of float32 adapters on a bfloat16 base in bfloat16, which changes
        # them by 0.2% (docs/findings.md).
        "communication_data_type": "fp32",
        # torch's AdamW is kept even if the optimiser is offloaded: its state is small with LoRA, and DeepSpeed's own
        # CPU optimiser would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": file.get("steps_per_print", 2**31),  # by default never: the run prints its own lines
    }


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Within the block and under ZeRO-3, transformers gives each rank only its own shard of the weights."""
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)  # transformers holds only a weak reference to it
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
            layer_class: class of the decoder layers; under ZeRO-3 each is gathered as a whole.
            attention_parity: passed on to `rank_micro_batches`.
            collective_timeout_minutes: for the collectives among hosts (gloo).
            groups: groups that together hold each trained parameter once, each with its own learning rate.
                None: one group of all. No recipe gives groups yet.
        Raises:
            ValueError: the groups do not hold each trained parameter exactly once.
            UserError: DeepSpeed would train in another dtype than the adapters'.
        """
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        if config["zero_optimization"]["stage"] == 3 and layer_class is not None:
            # A leaf module is gathered as a whole, adapters included: one collective for each layer, and the same one
            # for streams with and without adapters.
            set_z3_leaf_modules(model, [layer_class])
        self._groups = one_group(model) if groups is None else tuple(groups)
        check_groups(self._groups, model)
        trainable = [parameter for group in self._groups for parameter in group.parameters]
        dtypes = {parameter.dtype for parameter in trainable}
        # `step` sets the learning rate of each group anew, so the initial one is never used.
        optimizer = torch.optim.AdamW(optimizer_groups(self._groups), lr=0.0, betas=betas, weight_decay=weight_decay)
        self.streams: Mapping[str, Stream] = model.streams
        """The streams that this model can forward, by name."""
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # For small values on the hosts: over NCCL they would have to wait for the GPU's queue.
        self._hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=collective_timeout_minutes))
        self._attention_parity = attention_parity
        self._ranks = current_ranks()
        if {parameter.dtype for parameter in trainable} != dtypes:
            raise UserError(
                "lora.dtype: DeepSpeed would train the adapters in the model's dtype at this ZeRO stage; "
                "use ZeRO-3, or set lora.dtype: bfloat16"
            )

    @property
    def module(self) -> nn.Module:
        """The model that the engine shards."""
        return self._engine.module

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine; only `checkpoint/` may use it."""
        return self._engine

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self._engine.device

    @property
    def ranks(self) -> Ranks:
        """The place of this rank: its data rank and its sequence rank."""
        return self._ranks

    @property
    def rank(self) -> int:
        """The global rank."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return self._ranks.world_size

    def __call__(
        self,
        micro_batch: MicroBatch,
        streams: Seq[Stream],
        *,
        with_statistics: bool = False,
        through_logits: bool = False,
    ) -> dict[str, Output]:
        """Forward one micro-batch through the given streams in one pass over the weights; outputs by stream name.

        Every rank must call it the same number of times, with the same streams and options: under ZeRO-3 each forward
        contains collectives.

        Args:
            streams: some of `self.streams`.
            with_statistics: whether the outputs hold the entropy and the most probable tokens, for the metrics.
            through_logits: forward one stream by Hugging Face's own forward, for the check before the first step.
        """
        outputs: dict[str, Output] = self._engine(
            micro_batch, streams, with_statistics=with_statistics, through_logits=through_logits
        )
        return outputs

    def micro_batches(self, step: Step, tokens_per_micro_batch: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, on its device. Every rank gets the same number."""
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

        DeepSpeed averages over data ranks, so the share is multiplied by their number.

        Args:
            loss: a scalar with a graph.
            is_last: whether this is the last micro-batch of the step.
        """
        # DeepSpeed reduces gradients while the backward runs, so it must know the boundary before.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._ranks.loss_factor, scale_wrt_gas=False)

    def step(self, rates: float | Mapping[str, float], loss: Tensor | None = None) -> StepResult:
        """Clip the gradient and update the weights. If any rank has a non-finite loss or gradient, no rank updates.

        Gradients are clipped by the norm over all groups. The ranks agree on whether everything is finite before
        DeepSpeed's step: some of its releases apply a gradient that is NaN (0.19.5 to 0.19.7 under ZeRO-3), and none of
        them sees the loss.

        Args:
            rates: the run's learning rate, which each group multiplies by its scale; or the rate of each group, by
                name.
            loss: this rank's share of the step's loss, summed over its micro-batches, on its device.
        Raises:
            ValueError: a group has no rate, or a rate has no group.
        """
        rate_of = rates_of(self._groups, rates)
        optimizer = self._engine.optimizer
        own_loss = torch.zeros((), device=self.device) if loss is None else loss.detach()
        # A sum is not finite if one of its terms is not, and NaN * 0 is NaN. So a non-finite loss on any rank shows in
        # the sum, while each data rank's loss is counted once. Reading the sum waits for the device, but only once a
        # step, just before DeepSpeed's step would wait for its own norm.
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
        """The element-wise sum of a tensor over data ranks, on every rank. Every rank must call it."""
        total = values.detach().clone().to(self.device)
        if not self._ranks.counts:
            total.zero_()  # another rank of the same data rank holds the same values and contributes them
        torch.distributed.all_reduce(total)
        return total

    def max_over_ranks(self, value: float) -> float:
        """The maximum of a number over all ranks; infinite if any of them is NaN. Every rank must call it."""
        # ReduceOp.MAX ignores a NaN, but here a NaN must not be lost.
        largest = torch.tensor([float("inf") if math.isnan(value) else value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return float(largest)

    def agree(self, value: int) -> int:
        """The maximum of a number over all ranks, exchanged between hosts without the GPU. Every rank must call it."""
        largest = torch.tensor([value])
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self._hosts)
        return int(largest)

    def gather_objects(self, value: T) -> list[T]:
        """A list of one small value from each rank, in the order of ranks, on every rank. Every rank must call it."""
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def gather_over_data(self, value: T) -> list[T]:
        """A list of one small value from each data rank, in their order, on every rank. Every rank must call it."""
        return self.gather_objects(value)[:: self._ranks.sequence_size]

    @contextmanager
    def gathered_trainable(self) -> Iterator[dict[str, Tensor]]:
        """Within the block, the whole trainable parameters by name. Frozen parameters are never gathered.

        Every rank must enter it.
        """
        import deepspeed

        # A forward without a backward leaves prefetched parameters in flight, which cannot be gathered again. The
        # optimiser's method is called, because the engine's also runs Python's garbage collector, which takes longer
        # than everything else here.
        if hasattr(self._engine.optimizer, "empty_partition_cache"):
            self._engine.optimizer.empty_partition_cache()
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(named.values())):
            yield {name: parameter.detach() for name, parameter in named.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block, the model is in evaluation mode and computes no gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()
