"""flash-attn's variable-length path, on a CPU through a stand-in: our bounds, and nothing derived in a layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flash_attn_stand_in
import pytest
import torch
import transformers.modeling_flash_attention_utils as hf_flash
from flash_attn_stand_in import Call, flash_attn_varlen_func
from tiny import build_tiny_model
from torch import Tensor
from toy import UFT, both, logps_by_name, logps_through_logits, streams_of, toy_model, toy_sequences

from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams.model import UFTModel

BATCH = micro_batch(toy_sequences(4))
NUM_LAYERS = 2
WINDOW = 8


@pytest.fixture
def calls() -> Iterator[list[Call]]:
    """Calls of the stand-in, which is there while the test runs."""
    with flash_attn_stand_in.installed() as recorded:
        yield recorded


def step(model: UFTModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-ratios of the packed batch, reference log-probs, and the adapters' gradients of UFT's loss."""
    logps = logps_by_name(model, BATCH)
    loss, _ = micro_batch_loss(UFT, BATCH, count_terms(UFT, BATCH.responses), logps)
    loss.backward()
    logps_R, reference_logps_R = logps["policy"], logps["reference"]
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_" in name and p.grad is not None}
    return (logps_R - reference_logps_R).detach(), reference_logps_R, gradients


# ---- the stand-in itself


@pytest.mark.parametrize("window", [-1, 3])
def test_the_stand_in_is_attention_within_each_sequence(window: int) -> None:
    """Against torch's own attention of each sequence alone, two query heads to a key head; 1e-6 in float32.

    A window of 3 shows the query, and 3 tokens before it.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    found = flash_attn_varlen_func(q, k, v, bounds, bounds, 7, 7, causal=True, window_size=(window, window))
    for start, end in ((0, 5), (5, 12)):
        visible = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window >= 0:
            visible &= visible.triu(-window)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (q, k, v)), attn_mask=visible, enable_gqa=True
        )
        torch.testing.assert_close(found[start:end], expected.transpose(0, 1), rtol=0, atol=1e-6)


def test_nothing_of_the_stand_in_stays() -> None:
    """After the block, transformers is as it was: no module, no function of ours, nothing loaded."""
    watched = (*flash_attn_stand_in.LOADED_BY_TRANSFORMERS, *flash_attn_stand_in.DERIVED_BY_TRANSFORMERS)

    def state() -> tuple[Any, ...]:
        matrix = hf_flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        return matrix, "flash_attn" in sys.modules, *(getattr(hf_flash, name) for name in watched)

    before = state()
    with flash_attn_stand_in.installed():
        hf_flash.lazy_import_flash_attention("flash_attention_2")
        assert all(one != other for one, other in zip(state()[:2], before[:2], strict=True))
        assert hf_flash._flash_varlen_fn is not None
    assert state() == before


# ---- our model through it


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_flash_attention_equals_sdpa(folder: Path, calls: list[Call], gradient_checkpointing: bool) -> None:
    """Packed, float32, every architecture, with and without a window; gradients to 1e-5 of a tensor's largest entry.

    Log-ratios to 1.5e-7 of the log-probs whose difference they are: float32 keeps 1.2e-7 of a number. Of most models
    that is 1e-5 nats; a tied Granite, whose logits are four times as large here, has log-probs of -170 nats.
    Gemma 2 has no sdpa: there it is eager.
    """
    options: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing}
    ratios_R, reference_R, gradients = step(toy_model(folder, attention="flash_attention_2", **options))
    assert calls
    num_calls = len(calls)
    expected_ratios_R, expected_reference_R, expected = step(toy_model(folder, **options))
    assert len(calls) == num_calls, "sdpa and eager must not come here"
    assert expected_ratios_R.abs().mean() > 0.1
    rounding = 1.5e-7 * float(expected_reference_R.abs().max())
    torch.testing.assert_close(ratios_R, expected_ratios_R, rtol=0, atol=rounding)
    torch.testing.assert_close(reference_R, expected_reference_R, rtol=0, atol=rounding)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("reference_mode", ["lockstep", "separate"])
def test_every_layer_gets_the_very_bounds(family_folder: Path, calls: list[Call], reference_mode: Any) -> None:
    """One call a layer and stream, each with the micro-batch's own tensor and number: nothing is derived in a layer.

    transformers' own derivations raise here.
    """
    model = toy_model(family_folder, attention="flash_attention_2", reference_mode=reference_mode)
    both(model, BATCH)
    assert len(calls) == 2 * NUM_LAYERS
    assert [call.records_gradient for call in calls].count(True) == NUM_LAYERS
    for call in calls:
        assert call.bounds_q is BATCH.bounds_S
        assert call.bounds_k is BATCH.bounds_S
        assert (call.longest_q, call.longest_k) == (BATCH.longest, BATCH.longest)


def test_a_backward_recomputes_the_policy_with_the_same_bounds(tiny_qwen2: Path, calls: list[Call]) -> None:
    """Checkpointed: a third call of each layer, in the backward, with the same tensor; the reference is not run."""
    step(toy_model(tiny_qwen2, attention="flash_attention_2", gradient_checkpointing=True))
    assert len(calls) == 3 * NUM_LAYERS
    assert all(call.bounds_q is BATCH.bounds_S and call.longest_q == BATCH.longest for call in calls)


def test_one_stream_gets_the_same_bounds(tiny_qwen2: Path, calls: list[Call]) -> None:
    """Policy alone, reference alone: a call a layer each."""
    model = toy_model(tiny_qwen2, attention="flash_attention_2")
    with torch.no_grad():
        for number, name in enumerate(("policy", "reference")):
            model(BATCH, streams_of(model, name))
            assert len(calls) == (number + 1) * NUM_LAYERS
    assert all(call.bounds_q is call.bounds_k is BATCH.bounds_S for call in calls)


def test_the_check_through_logits_forwards_each_sequence_alone(tiny_qwen2: Path, calls: list[Call]) -> None:
    """By Hugging Face's own forward: a call a layer and sequence, with the bounds of that one."""
    with torch.no_grad():
        logps_through_logits(toy_model(tiny_qwen2, attention="flash_attention_2"), BATCH)
    lengths = BATCH.bounds_S.diff().tolist()
    assert len(lengths) == 4
    expected = [[0, length] for length in lengths for _ in range(NUM_LAYERS)]
    assert [call.bounds_q.tolist() for call in calls] == expected
    assert all(call.bounds_k is call.bounds_q for call in calls)


@pytest.mark.parametrize("sequences", [0, 1], ids=["the dummy", "one sequence"])
def test_a_single_sequence_takes_the_same_path(tiny_qwen2: Path, calls: list[Call], sequences: int) -> None:
    """Nothing is packed, yet the same kernel runs, with bounds of one sequence."""
    batch = micro_batch(toy_sequences(sequences))
    both(toy_model(tiny_qwen2, attention="flash_attention_2"), batch)
    assert len(calls) == 2 * NUM_LAYERS
    assert all(call.bounds_q is batch.bounds_S and len(call.bounds_q) == 2 for call in calls)


def test_a_window_counts_the_query_itself(tmp_path: Path, calls: list[Call]) -> None:
    """Of 8 tokens: 7 before the query, as flash-attn counts; without a window no limit."""
    for architecture, window, expected in (("mistral", WINDOW, (7, 7)), ("llama", None, (-1, -1))):
        calls.clear()
        folder = build_tiny_model(tmp_path / architecture, architecture, sliding_window=window)
        both(toy_model(folder, attention="flash_attention_2"), BATCH)
        assert {call.window for call in calls} == {expected}


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bfloat16_base_reaches_flash_attn_in_bfloat16(
    family_folder: Path, calls: list[Call], lora_dtype: torch.dtype
) -> None:
    """The real kernel takes half precision alone: adapters in float32 must not lift queries, keys or values."""
    model = toy_model(family_folder, dtype=torch.bfloat16, lora_dtype=lora_dtype, attention="flash_attention_2")
    both(model, BATCH)
    assert len(calls) == 2 * NUM_LAYERS
    assert {call.dtype for call in calls} == {torch.bfloat16}
