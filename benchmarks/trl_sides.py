"""One run of each side of `against_trl.py`, on a rank: ours, and TRL's own trainer.

Not a benchmark itself.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import process_costs
import torch
from step_products import products_of, seconds_of, share_in_step
from toy import objective
from trl_workloads import Workload, real_tokens, steps_of

from uft_ds.streams.recompute import Recompute

LORA_RANK, ALPHA, BETA = 8, 16.0, 0.1
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Result:
    """Of one rank: the loss of each step (of this rank's rows, or of all), seconds of a step, and the growth of its
    resident memory over that of the engine before the first step; on a GPU the peak of all that is allocated.

    product_seconds: what the matrix products of the last step take alone, one after the other; 0 where not measured, as
        on a GPU.
    share_in_step: of the time of that step, what they and its attention take in it; 0 likewise.
    """

    losses: list[float]
    seconds: list[float]
    peak_growth_bytes: int
    product_seconds: float = 0.0
    share_in_step: float = 0.0


def deepspeed_file(work: Workload, *, own_linear: bool = True) -> dict[str, Any]:
    from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file

    file = read_deepspeed_file(work.deepspeed)
    file["zero_optimization"] |= work.zero
    return deepspeed_config(file, dtype=work.dtype, max_grad_norm=1.0, own_linear=own_linear)


def reset_peak() -> int:
    """Start the peak of memory anew; the bytes from which it is counted."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    return process_costs.reset_peak()


def peak() -> int:
    """The peak of memory since `reset_peak`, bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return process_costs.peak_rss()


def run_ours(work: Workload, adapter: Path, recompute: Recompute) -> Result:
    from uft_ds.data.packing import Packing
    from uft_ds.engine.engine import Engine, partitioned_loading
    from uft_ds.known.cache import Known
    from uft_ds.streams.adapters import add_adapters
    from uft_ds.streams.load import decoder_layer_class, load_base
    from uft_ds.streams.model import UFTModel
    from uft_ds.training.forwarding import Method
    from uft_ds.training.step import run_step

    config = deepspeed_file(work, own_linear=recompute != "selective")
    with partitioned_loading(config):
        base = load_base(
            str(work.folder),
            revision=None,
            dtype=work.dtype,
            attention="packed",
            gradient_checkpointing=recompute,
        )
    policy = add_adapters(base, rank=LORA_RANK, alpha=ALPHA, targets="all-linear", dtype=torch.float32, seed=1)
    start_from(policy, adapter)
    engine = Engine(
        UFTModel(policy),
        config,
        layer_class=decoder_layer_class(base),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        packing=Packing(share_prompts=True),
    )
    method = Method(engine, objective(work.loss, BETA), Known.of_reference("lockstep"), 1 << 20)
    losses, seconds, base_bytes = [], [], reset_peak()
    for step in steps_of(work):
        started = time.perf_counter()
        metrics = run_step(method, step, work.learning_rate).metrics
        seconds.append(time.perf_counter() - started)
        losses.append(metrics["loss"])
    growth = peak() - base_bytes
    if torch.cuda.is_available():
        return Result(losses, seconds, growth)
    last = partial(run_step, method, step, work.learning_rate)
    return Result(losses, seconds, growth, seconds_of(products_of(last)), share_in_step(last))


def run_trl(work: Workload, adapter: Path, leaf: bool) -> Result:
    from deepspeed.utils import set_z3_leaf_modules
    from peft import LoraConfig

    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    with tempfile.TemporaryDirectory() as output:
        trainer, recording = recording_trainer(work, output, adapters=lora)
        start_from(trainer.model, adapter)
        if leaf:
            set_z3_leaf_modules(trainer.model, [type(trainer.model.get_base_model().get_decoder().layers[0])])
        trainer.train()
    return recording.result()


@dataclass
class Recording:
    """What is noted of each step that TRL's trainer makes. base_bytes: where the growth of memory is counted from."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    base_bytes: int | None = None

    def result(self) -> Result:
        """After the last step."""
        assert self.base_bytes is not None, "no step was made"
        return Result(self.losses, self.seconds, peak() - self.base_bytes)


def recording_trainer(
    work: Workload, output: str, *, adapters: Any = None, two_models: bool = False, counts_weights: bool = False
) -> tuple[Any, Recording]:
    """TRL's trainer of a workload's loss, ready to train, and what it will have noted of its steps.

    Args:
        output: a folder for the trainer.
        adapters: PEFT's configuration of those that are trained; None: all parameters.
        two_models: whether a second model is the reference, each in an engine of its own.
        counts_weights: count memory from before any weight is loaded, not from the first step.
    """
    # accelerate looks for DeepSpeed only where it is told to; and on a CPU it believes in one process.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from uft_ds.host.process import returning_freed_memory

    recording = Recording(base_bytes=reset_peak() if counts_weights else None)
    config: Any  # its annotations are narrower than what it takes
    parent, config, loss_type = (
        (KTOTrainer, KTOConfig, "apo_zero_unpaired") if work.loss == "l1" else (DPOTrainer, DPOConfig, "sigmoid")
    )

    class Trainer(parent):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already: the very rows that we train on

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            recording.losses.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if recording.base_bytes is None:  # the engine stands, nothing has been forwarded
                recording.base_bytes = reset_peak()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recording.seconds.append(time.perf_counter() - self.started)

    settings = config(
        output_dir=output, loss_type=loss_type, beta=BETA, learning_rate=work.learning_rate,
        per_device_train_batch_size=work.rows_per_rank, gradient_accumulation_steps=1, max_steps=work.steps,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, adam_beta2=0.999,
        gradient_checkpointing=True, deepspeed=left_to_trainer(deepspeed_file(work)),
        bf16=work.dtype == torch.bfloat16,
        max_length=None,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    if not torch.cuda.is_available():
        believe_in_all_ranks()
    with returning_freed_memory():  # as our loading does: memory is compared
        model, *reference = (
            AutoModelForCausalLM.from_pretrained(work.folder, dtype=work.dtype, attn_implementation="sdpa")
            for _ in range(1 + two_models)
        )
    trainer = Trainer(
        model=model,
        ref_model=reference[0] if reference else None,
        args=settings,
        train_dataset=Dataset.from_list(work.rows),
        processing_class=AutoTokenizer.from_pretrained(work.folder),
        peft_config=adapters,
        callbacks=[Clock()],
    )
    return trainer, recording


def left_to_trainer(config: dict[str, Any]) -> dict[str, Any]:
    owned = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return config | dict.fromkeys(owned, "auto")


def believe_in_all_ranks() -> None:
    """On a CPU with DeepSpeed accelerate takes each rank for the only one: all would get the same rows."""
    from accelerate.state import PartialState

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    PartialState._shared_state.update(num_processes=world_size, process_index=rank, local_process_index=rank)


def start_from(policy: Any, adapter: Path) -> None:
    """Both sides start from the same file: A drawn once, B zero."""
    from safetensors.torch import load_file

    tensors = load_file(adapter)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            own = tensors[name.split("base_model.model.", 1)[1]]
            parameter.data = own.to(parameter.device, parameter.dtype, copy=True)


def write_adapter(base: Path, adapter: Path) -> None:
    from safetensors.torch import save_file

    from uft_ds.streams.adapters import add_adapters
    from uft_ds.streams.load import load_base

    model = load_base(str(base), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    policy = add_adapters(model, rank=LORA_RANK, alpha=ALPHA, targets="all-linear", dtype=torch.float32, seed=1)
    prefix = "base_model.model."
    save_file({n.removeprefix(prefix): p.detach() for n, p in policy.named_parameters() if "lora_" in n}, adapter)


def tokens_per_second(work: Workload, results: list[Result]) -> float:
    """Real tokens of the steps after the warm-up, over the time that the slower rank took."""
    steps = range(WARM_UP_STEPS, work.steps)
    elapsed = sum(max(result.seconds[step] for result in results) for step in steps)
    return sum(real_tokens(work, step) for step in steps) / elapsed


def losses_over_ranks(results: list[Result]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(r.losses for r in results), strict=True)]
