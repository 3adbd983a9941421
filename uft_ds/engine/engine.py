"""The engine: a model sharded by DeepSpeed, which only `engine/`, `export/` and `doctor/` know.

It keeps the scale of the gradient exact: a step's gradient is that of sum(terms) / number of terms, for any number of
ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._tensor_str import printoptions

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import UNSHARED, Packing, rank_micro_batches
from uft_ds.engine import gathering, gradients
from uft_ds.engine.groups import ParameterGroup, check_groups, one_group, optimizer_groups, rates_of
from uft_ds.engine.ranks import Ranks, current_ranks, sequence_group
from uft_ds.engine.zero_section import NODE_KEY
from uft_ds.errors import UserError
from uft_ds.host.process import returning_freed_memory
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import Output, Stream

T = TypeVar("T")


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


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Within the block and under ZeRO-3, transformers gives each rank only its own shard of the weights."""
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)  # transformers holds only a weak reference to it
    with returning_freed_memory():
        yield
    del keep_alive


def with_shards_on_host(config: dict[str, Any]) -> dict[str, Any]:
    """A config to load weights with whose shards stay in page-locked host memory under ZeRO-3, whatever it says.

    A parameter keeps the device of the `zero.Init` that has converted it (partition_parameters.py: `_partition_param`,
    0.19.8), and the engine converts only what is not converted yet: so one engine holds weights in both places.

    Such weights are sharded over all ranks, also where others have a second copy inside each node. DeepSpeed makes the
    groups of such copies once (utils/groups.py: `_create_zero_param_parallel_group`), and gathers the two kinds apart.
    """
    changes = {"offload_param": {"device": "cpu", "pin_memory": True}, NODE_KEY: 1}
    return config | {"zero_optimization": config["zero_optimization"] | changes}


@contextmanager
def _tensors_shown_short() -> Iterator[None]:
    """Within the block, a tensor is written as text without its values.

    ZeRO-3 makes a text of all parameters for a message that it then does not show (stage3.py, `initialized ... with
    args`, 0.19.8): of a small model, a third of the time that its engine takes.
    """
    with printoptions(threshold=0, edgeitems=0):
        yield


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
        packing: Packing = UNSHARED,
        collective_timeout_minutes: float = 30.0,
        groups: Seq[ParameterGroup] | None = None,
    ) -> None:
        """
        Args:
            layer_class: class of the decoder layers; under ZeRO-3 each is gathered as a whole.
            packing: how steps are divided. Prompts are shared only where the model's attention can.
            collective_timeout_minutes: for the collectives among hosts (gloo).
            groups: groups that together hold each trained parameter once, each with its own learning rate.
                None: one group of all.
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
        # DeepSpeed gives it one flat tensor for each group: a fused update is one kernel for all adapters.
        optimizer = torch.optim.AdamW(
            optimizer_groups(self._groups), lr=0.0, betas=betas, weight_decay=weight_decay, fused=True
        )
        self._ranks = current_ranks(packing.sequence_size)
        if packing.sequence_size > 1:
            model.divide_rows(sequence_group(self._ranks))
        self.streams: Mapping[str, Stream] = model.streams
        """The streams that this model can forward, by name."""
        with _tensors_shown_short():
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # For small values on the hosts: over NCCL they would have to wait for the GPU's queue.
        self._hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=collective_timeout_minutes))
        self._packing = replace(packing, share_prompts=packing.share_prompts and model.can_share_prompts)
        self._is_whole = False
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

    @property
    def shares_prompts(self) -> bool:
        """Whether `micro_batches` holds a prompt once for several sequences of a micro-batch."""
        return self._packing.share_prompts

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
        """This rank's micro-batches of a step, on its device. Every rank gets the same number.

        Args:
            tokens_per_micro_batch: that a rank computes; ranks that share sequences have as many times that together.
        """
        batches = rank_micro_batches(
            step,
            tokens_per_micro_batch=tokens_per_micro_batch * self._ranks.sequence_size,
            rank=self._ranks.data_rank,
            world_size=self._ranks.data_size,
            packing=self._packing,
        )
        return [batch.to(self.device) for batch in batches]

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss, exactly.

        DeepSpeed averages over ranks, so the share is multiplied by their number.

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
        # the sum, while each data rank's loss is counted once. This is the only collective before the update, and its
        # result the only one that the host waits for: DeepSpeed's step takes the norm from here.
        counted_loss = own_loss.double() * float(self._ranks.counts)
        sums = torch.stack([counted_loss, gradients.squared_norm(optimizer).to(self.device)])
        torch.distributed.all_reduce(sums)
        total_loss, squared_norm = sums.tolist()
        if not math.isfinite(total_loss) or not math.isfinite(squared_norm):
            gradients.drop(optimizer)
            return StepResult(math.sqrt(squared_norm), skipped=True, loss=total_loss)
        for group in optimizer.param_groups:
            group["lr"] = rate_of[group["name"]]
        norm = math.sqrt(squared_norm)
        with gradients.norm_given(optimizer, norm):
            self._engine.step()
        return StepResult(norm, skipped=bool(optimizer.overflow), loss=total_loss)

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
        """A list of one small value from each rank, in the order of ranks, on every rank. Every rank must call it.

        Exchanged between hosts: over NCCL each value would be copied to the GPU and back, and wait for its queue.
        """
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value, group=self._hosts)
        return gathered

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank; the others' is not used. Exchanged between hosts. Every rank must call it."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self._hosts)
        return values[0]

    def gather_over_data(self, value: T) -> list[T]:
        """A list of one small value from each data rank, in their order, on every rank. Every rank must call it."""
        return self.gather_objects(value)[:: self._ranks.sequence_size]

    @contextmanager
    def gathered_trainable(self) -> Iterator[dict[str, Tensor]]:
        """Within the block, the whole trainable parameters by name. Frozen parameters are never gathered.

        Every rank must enter it.
        """
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with gathering.gathered(self._engine, list(named.values())):
            yield {name: parameter.detach() for name, parameter in named.items()}

    @property
    def gathers_layers(self) -> bool:
        """Whether each forward gathers layers, so that all ranks must forward as often: ZeRO-3, outside of `whole`."""
        return bool(self._engine.zero_optimization_partition_weights()) and not self._is_whole

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block, each rank holds all weights of the policy, and may forward it as often as it likes.

        For forwards without gradient, not of the root module, nor of a reference's own copy of the base. Afterwards the
        weights are partitioned as before, and ZeRO-3's prefetch trace is the one that training has recorded. At other
        stages it does nothing. Every rank must enter it.
        """
        policy: Any = self.module.policy
        with gathering.whole(self._engine, policy) if self.gathers_layers else nullcontext():
            self._is_whole = True
            try:
                yield
            finally:
                self._is_whole = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block, the model is in evaluation mode and computes no gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()
