"""A loss or gradient that is not finite on one rank skips the step on all, whatever DeepSpeed does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from engines import REAL_PARTITIONING
from ranks import run_on_ranks
from tiny import build_tiny_model
from toy import UFT, forwarded, toy_model, toy_step

from uft_ds.data.packing import rank_micro_batches
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, StepResult, partitioned_loading
from uft_ds.engine.optimizer_state import KEYS, pieces_of
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams.load import decoder_layer_class

Poison = Literal["no", "loss", "gradient"]

FLOAT32: dict[str, Any] = {}
BFLOAT16 = {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16}
MIXED = {"dtype": torch.bfloat16, "lora_dtype": torch.float32}
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}

HISTORY: tuple[Poison, ...] = ("no", "loss", "gradient", "no", "no")
"""Two good steps at the end: what the first keeps of a bad one in its buffers or moments, the second shows."""


def deaf_deepspeed() -> None:
    """As 0.19.5 to 0.19.7 under ZeRO-3, and worse: nothing is noticed, a norm that is not finite is taken as 1."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module, name in ((stage3, "DeepSpeedZeroOptimizer_Stage3"), (stage_1_and_2, "DeepSpeedZeroOptimizer")):
        module.is_invalid_grad_norm = lambda norm: False
        module.combine_grad_norm_groups = lambda norms, norm_type=2: torch.tensor(1.0)
        getattr(module, name).has_overflow = lambda self, partition_gradients=True: False


def engine_at(base: Path, file: str, zero: dict[str, Any], model: dict[str, Any]) -> Engine:
    config = read_deepspeed_file(file)
    config["zero_optimization"] |= zero | ({} if file == "zero2" else REAL_PARTITIONING)
    filled = deepspeed_config(config, dtype=model.get("dtype", torch.float32), max_grad_norm=0.5)
    with partitioned_loading(filled):
        uft_model = toy_model(base, **model)
    layer = decoder_layer_class(uft_model.policy.get_base_model())
    return Engine(uft_model, filled, layer_class=layer, weight_decay=0.01)


def one_step(engine: Engine, poison: Poison) -> StepResult:
    """Several micro-batches; the first one of rank 1 is poisoned, in its loss or in one number of its gradient."""
    step = toy_step()
    terms = count_terms(UFT, step.responses)
    batches = rank_micro_batches(step, tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size)
    assert len(batches) > 1
    total = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(batches):
        is_poisoned = engine.rank == 1 and number == 0
        logps = forwarded(engine, batch)
        if poison == "gradient" and is_poisoned:
            logps["policy"].register_hook(infinite_in_one_place)
        loss, _ = micro_batch_loss(UFT, batch, terms, logps)
        if poison == "loss" and is_poisoned:
            loss = loss * float("nan")
        engine.backward(loss, is_last=number == len(batches) - 1)
        total += loss.detach()
    assert math.isfinite(float(total)) == (poison != "loss" or engine.rank != 1)
    return engine.step(1e-2, total)


def infinite_in_one_place(gradient_R: torch.Tensor) -> torch.Tensor:
    changed_R = gradient_R.clone()
    changed_R[0] = float("inf")
    return changed_R


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights, and this rank's masters and moments."""
    pieces = {f"{p.name}.{key}": p.tensors[key].cpu().clone() for p in pieces_of(engine.deepspeed) for key in KEYS}
    with engine.gathered_trainable() as named:
        return pieces | {name: tensor.cpu().clone() for name, tensor in named.items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def with_bad_steps(base: Path, file: str, zero: dict[str, Any], model: dict[str, Any]) -> Any:
    """The history on an engine, then its good steps alone on another."""
    deaf_deepspeed()
    engine = engine_at(base, file, zero, model)
    results, moved, before = [], [], state_of(engine)
    for poison in HISTORY:
        results.append(one_step(engine, poison))
        after = state_of(engine)
        moved.append(not same_bits(before, after))
        before = after
    clean = engine_at(base, file, zero, model)
    expected = [one_step(clean, poison) for poison in HISTORY if poison == "no"]
    return results, moved, expected, same_bits(before, state_of(clean))


@pytest.mark.parametrize(
    ("file", "zero", "model"),
    [
        pytest.param("zero3_cpu", {}, FLOAT32, id="zero3-float32"),
        pytest.param("zero3_cpu", {}, BFLOAT16, id="zero3-bfloat16", marks=pytest.mark.long),
        pytest.param("zero3_cpu", {}, MIXED, id="zero3-mixed", marks=pytest.mark.long),
        pytest.param("zero3_cpu", OFFLOADED, FLOAT32, id="zero3-offloaded", marks=pytest.mark.long),
        pytest.param("zero2", {}, FLOAT32, id="zero2-float32", marks=pytest.mark.long),
        pytest.param("zero2", {}, BFLOAT16, id="zero2-bfloat16", marks=pytest.mark.long),
        pytest.param("zero2", OFFLOADED, FLOAT32, id="zero2-offloaded", marks=pytest.mark.long),
        pytest.param("zero2", OFFLOADED, BFLOAT16, id="zero2-bfloat16-offloaded", marks=pytest.mark.long),
    ],
)
def test_a_bad_step_leaves_no_trace(tmp_path: Path, file: str, zero: dict[str, Any], model: dict[str, Any]) -> None:
    """Under a DeepSpeed that notices nothing: weights, masters and moments of all ranks stay, and the good steps after
    it are bit for bit those of a run that never saw it."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    for results, moved, expected, is_same in run_on_ranks(with_bad_steps, 2, base, file, zero, model):
        assert [result.skipped for result in results] == [poison != "no" for poison in HISTORY]
        assert moved == [poison == "no" for poison in HISTORY]
        assert [result for result in results if not result.skipped] == expected
        assert is_same
        of_loss, of_gradient = (results[HISTORY.index(poison)] for poison in ("loss", "gradient"))
        assert math.isnan(of_loss.loss)
        assert of_gradient.loss == pytest.approx(results[0].loss, abs=0.5)
        assert not math.isfinite(of_gradient.grad_norm)


def finite_gradient_of_a_bad_loss(base: Path) -> Any:
    """A loss whose gradient does not depend on what is not finite in it."""
    engine = engine_at(base, "zero3_cpu", {}, FLOAT32)
    one_step(engine, "no")
    before = state_of(engine)
    batch = rank_micro_batches(toy_step(), tokens_per_micro_batch=512, rank=engine.rank, world_size=2)[0]
    loss, _ = micro_batch_loss(UFT, batch, count_terms(UFT, toy_step().responses), forwarded(engine, batch))
    engine.backward(loss, is_last=True)
    result = engine.step(1e-2, loss + (float("inf") if engine.rank == 1 else 0.0))
    return result, same_bits(before, state_of(engine))


def test_a_bad_loss_skips_though_its_gradient_is_finite(tiny_qwen2: Path) -> None:
    """The loss counts by itself: with it not finite on one rank nothing moves on any."""
    for result, is_same in run_on_ranks(finite_gradient_of_a_bad_loss, 2, tiny_qwen2):
        assert result.skipped
        assert is_same
        assert result.loss == math.inf
        assert math.isfinite(result.grad_norm)


def without_agreement(base: Path, file: str) -> tuple[bool, float]:
    deaf_deepspeed()
    engine = engine_at(base, file, {}, FLOAT32)
    one_step(engine, "no")
    step = toy_step()
    batch = rank_micro_batches(step, tokens_per_micro_batch=512, rank=engine.rank, world_size=2)[0]
    loss, _ = micro_batch_loss(UFT, batch, count_terms(UFT, step.responses), forwarded(engine, batch))
    engine.backward(loss * (float("nan") if engine.rank == 1 else 1.0), is_last=True)
    engine.deepspeed.step()
    norm = float(engine.deepspeed.get_global_grad_norm())
    return any(not bool(tensor.isfinite().all()) for tensor in state_of(engine).values()), norm


@pytest.mark.long
@pytest.mark.parametrize("file", ["zero3_cpu", "zero2"])
def test_the_deaf_deepspeed_would_apply_it(tiny_qwen2: Path, file: str) -> None:
    """Of the emulation itself: DeepSpeed's own step, called directly, takes a NaN gradient for one of norm 1."""
    assert run_on_ranks(without_agreement, 2, tiny_qwen2, file) == [(True, 1.0)] * 2
