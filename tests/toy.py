"""Toy sequences, a policy whose adapters are not zero, and the step they make: shared by many tests."""

import copy
from collections.abc import Sequence as Seq
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import VOCAB_SIZE, build_tiny_model
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.engine.gathering import whole_parameter
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.objectives.reference import HowForwarded
from uft_ds.streams.adapters import add_adapters, start_from_adapter, start_policy_from_adapter
from uft_ds.streams.load import attention_implementation, check_base, load_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.recompute import Recompute
from uft_ds.streams.reward_adapter import add_reward_adapter
from uft_ds.streams.stream import POLICY, SCORING, Stream, logps_of


def objective(loss: str = "mse", beta: float = 0.1, **shared: Any) -> Objective:
    """One loss for all kinds."""
    return Objective(dict.fromkeys(KINDS, KindObjective({loss: 1.0}, beta=beta)), **shared)


UFT = objective()


def toy_sequences(count: int, *, seed: int = 0, longest: int = 40) -> tuple[Sequence, ...]:
    """Random tokens with 1 to 3 responses each, scores from 0 to 1, lengths uneven."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(count):
        num_responses = int(rng.integers(1, 4))
        length = int(rng.integers(6 * num_responses, max(longest, 6 * num_responses + 1)))
        cuts = np.sort(rng.choice(np.arange(1, length), size=2 * num_responses, replace=False))
        kinds: tuple[Kind, ...] = ("instruction", "score")
        responses = tuple(
            Response(int(a), int(b), float(rng.random()), kinds[int(rng.integers(2))], f"toy:{number}.{i}")
            for i, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=True))
        )
        tokens = rng.integers(3, VOCAB_SIZE, size=length).astype(np.int32)
        sequences.append(Sequence(tokens[: responses[-1].end], responses))
    return tuple(sequences)


def toy_step(count: int = 7, *, seed: int = 0) -> Step:
    return Step(0, toy_sequences(count, seed=seed))


def toy_base(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    gradient_checkpointing: Recompute = False,
    quantization: str | None = None,
) -> Any:
    """The frozen base in `folder`; attention: as for `toy_model`."""
    return load_base(
        str(folder),
        revision=None,
        dtype=dtype,
        attention=attention or attention_implementation("auto", torch.float32, check_base(str(folder), None)),
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization,
        whole=whole_parameter,
    )


def toy_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype = torch.float32,
    b_std: float = 0.05,
    gradient_checkpointing: Recompute = False,
    attention: str | None = None,
    reference_mode: HowForwarded = "lockstep",
    activation_offload: bool = False,
    reference_adapter: Path | None = None,
    start_adapter: Path | None = None,
    trains_head: bool = False,
    chunk_bytes: int | None = None,
    further: Seq[Stream] = (),
    reward_adapter: Path | None = None,
    targets: Any = "all-linear",
    experts: bool = False,
    trains_all: bool = False,
    quantization: str | None = None,
    reference: Any = None,
) -> UFTModel:
    """The model in `folder` with adapters; B drawn with `b_std`, so that log-ratios are of order 1.

    trains_all: without adapters; of the further options those that shape adapters have no effect then.
    reference: the frozen copy beside a base that is trained.
    attention: by default sdpa, or eager for a model without it, whatever is installed.
    further: streams beside policy and reference, each with an adapter of its own, drawn from its name, or the policy's.
    reward_adapter: of a reward model that is attached, as an online run does it.
    """
    base = toy_base(
        folder,
        dtype=dtype,
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization,
    )
    if trains_all:
        base.requires_grad_(True)
        return UFTModel(
            base,
            reference=reference,
            reference_mode="separate",
            activation_offload=activation_offload,
            chunk_bytes=chunk_bytes,
        )
    policy = add_adapters(base, rank=4, alpha=8.0, targets=targets, dtype=lora_dtype, seed=1, experts=experts)
    if b_std:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * b_std).to(lora_dtype)
    if reference_adapter is not None:
        start_from_adapter(policy, reference_adapter)
    if start_adapter is not None:
        start_policy_from_adapter(policy, start_adapter)
    for stream in further:
        if stream.adapter != POLICY.adapter:
            add_drawn_adapter(policy, stream)
    heads = {}
    if reward_adapter is not None:
        heads[SCORING.name] = add_reward_adapter(policy, reward_adapter, "score_by", dtype=lora_dtype)
        further = (*further, SCORING)
    base.get_output_embeddings().weight.requires_grad_(trains_head)
    return UFTModel(
        policy,
        further=further,
        reference_mode=reference_mode,
        activation_offload=activation_offload,
        chunk_bytes=chunk_bytes,
        frozen_heads=heads,
    )


@lru_cache(maxsize=8)
def _kept(folder: Path, **options: Any) -> UFTModel:
    return toy_model(folder, **options)


def toy_model_again(folder: Path, **options: Any) -> UFTModel:
    """`toy_model` as a copy, in a third of the time where the same one was asked for before; a tuple is `further`."""
    return copy.deepcopy(_kept(folder, **options))


def add_drawn_adapter(policy: Any, stream: Stream) -> None:
    """An adapter for the stream, trained or frozen as it is; all else keeps its `requires_grad`."""
    assert stream.adapter is not None
    requires_grad = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    policy.add_adapter(stream.adapter, policy.peft_config["default"], autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(sum(stream.adapter.encode()))
    for name, parameter in policy.named_parameters():
        if f".{stream.adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.requires_grad = stream.trained
        else:
            parameter.requires_grad = requires_grad[name]


def streams_of(model: UFTModel, *names: str) -> tuple[Stream, ...]:
    """By default policy and reference."""
    return tuple(model.streams[name] for name in names or ("policy", "reference"))


def token_logps(model: UFTModel, batch: MicroBatch, *names: str) -> tuple[Tensor, ...]:
    """Log-probs of tokens, by default of policy and reference: [supervised tokens] each."""
    outputs = model(batch, streams_of(model, *names))
    return tuple(outputs[stream.name].token_logps_N for stream in streams_of(model, *names))


def logps_through_logits(model: UFTModel, batch: MicroBatch) -> Tensor:
    """Log-probs of tokens under the policy, by Hugging Face's own logits."""
    return model(batch, streams_of(model, "policy"), through_logits=True)["policy"].token_logps_N


def logps_by_name(model: UFTModel, batch: MicroBatch, *names: str) -> dict[str, Tensor]:
    """Sums over each response's tokens, by default of policy and reference, as `micro_batch_loss` takes them."""
    return logps_of(model(batch, streams_of(model, *names)), batch)


def both(model: UFTModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sums over each response's tokens, policy and reference."""
    logps = logps_by_name(model, batch)
    return logps["policy"], logps["reference"]


def forwarded(engine: Engine, batch: MicroBatch, *, with_reference: bool = True) -> dict[str, Tensor]:
    """What an engine's streams say of each response, as `micro_batch_loss` takes it."""
    names = ("policy", "reference") if with_reference else ("policy",)
    return logps_of(engine(batch, [engine.streams[name] for name in names]), batch)


def toy_policy(
    folder: Path,
    *,
    targets: Any = "all-linear",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    experts: bool = False,
) -> Any:
    """The base in `folder` with fresh adapters, B zero."""
    base = load_base(str(folder), revision=None, dtype=torch.float32, attention="auto", gradient_checkpointing=False)
    return add_adapters(base, rank=4, alpha=8.0, targets=targets, dtype=dtype, seed=seed, experts=experts)


def saved_adapter(folder: Path, out: Path, **options: Any) -> Path:
    """An adapter whose B is not zero, saved by PEFT."""
    policy: Any = toy_policy(folder, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    policy.save_pretrained(out)
    return out


def build(folder: Path, *args: Any, **kwargs: Any) -> Path:
    """`build_tiny_model`, once a folder."""
    return folder if (folder / "config.json").exists() else build_tiny_model(folder, *args, **kwargs)
