"""Packed rows against rows of one sequence, family by family, and the check at the start of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
import torch
from models import GPT2, LEAKS, PACKED, TARGETS, VOCAB_SIZE, sequences, tiny_model
from suites import long_but
from torch import Tensor
from toy import UFT, logps_by_name, streams_of

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.kernels.logits import LogitTransform
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import logps_of
from uft_ds.training.model_check import Differences, chosen_of, differences, problem_of

ROWS = sequences(37, 32, 30)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def step_of(
    model: UFTModel, groups: list[list[int]], rows: Seq[Sequence] = ROWS, *, share_prompts: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all responses and the gradients of one step, packed by `groups`."""
    model.zero_grad()
    terms = count_terms(UFT, [response for row in rows for response in row.responses])
    logps = []
    for group in groups:
        batch = micro_batch([rows[place] for place in group], share_prompts=share_prompts)
        of_streams = logps_by_name(model, batch)
        loss, _ = micro_batch_loss(UFT, batch, terms, of_streams)
        loss.backward()
        logps.append(of_streams["policy"].detach())
    return torch.cat(logps), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def measured(model: UFTModel, count: int = 3) -> Differences:
    """What the check at the start of a run measures."""
    model.eval()

    def forward(row: MicroBatch, own: bool) -> Any:
        return logps_of(model(row, streams_of(model, "policy"), through_logits=own), row)["policy"]

    with torch.no_grad():
        chosen = chosen_of(Step(0, tuple(ROWS[:count])))
        return differences(forward, *chosen, shares_prompts=model.can_share_prompts)


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_step_is_the_unpacked_one(name: str) -> None:
    """Invariant 2: log-probs to 1e-4 nats a response, and each adapter's gradient to 1e-4 of its largest entry."""
    model = tiny_model(PACKED[name], targets=TARGETS.get(name))
    packed_R, packed = step_of(model, [[0, 1, 2]])
    alone_R, alone = step_of(model, [[0], [1], [2]])
    torch.testing.assert_close(packed_R, alone_R, rtol=0, atol=1e-4)
    assert set(packed) == set(alone)
    for parameter, gradient in alone.items():
        largest = float(gradient.abs().max())
        assert largest > 0, f"{parameter}: a zero gradient proves nothing"
        torch.testing.assert_close(packed[parameter], gradient, rtol=0, atol=1e-4 * largest)


def answers_to(prompt: int, *lengths: int) -> list[Sequence]:
    """Sequences with the same first tokens, which no response has, then tokens and responses of their own."""
    rng = np.random.default_rng(prompt)
    tokens = rng.integers(3, VOCAB_SIZE, prompt)
    rows = []
    for number, length in enumerate(lengths):
        own = np.concatenate([tokens, rng.integers(3, VOCAB_SIZE, length)]).astype(np.int32)
        middle = prompt + length // 2
        # The second of two responses, as a merged conversation has, comes after a turn of the user.
        spans = [(prompt, middle), (middle + 1, len(own))] if length > 3 else [(prompt, len(own))]
        rows.append(Sequence(own, tuple(Response(a, b, 0.3 * number % 1, "score") for a, b in spans)))
    return rows


SHARING = [name for name in PACKED if name not in ("gptj", "codegen")]


@pytest.mark.parametrize("name", long_but(("qwen2", "gemma2", "gpt_neox", "qwen2_5_vl"), SHARING))
def test_a_shared_prompt_gives_the_unshared_step(name: str) -> None:
    """Prompts of several answers are in a row once, among others: the same log-probs, and each adapter's gradient."""
    model = tiny_model(PACKED[name], targets=TARGETS.get(name))
    long, short = answers_to(21, 9, 1, 14), answers_to(3, 2, 17)
    rows = [long[0], ROWS[1], short[0], long[1], short[1], long[2]]
    together = list(range(len(rows)))
    assert micro_batch(rows, share_prompts=True).token_ids_T.numel() == 21 + 24 + 3 + 19 + ROWS[1].num_tokens
    shared_R, shared = step_of(model, [together], rows, share_prompts=True)
    alone_R, alone = step_of(model, [[i] for i in together], rows)
    torch.testing.assert_close(shared_R, alone_R, rtol=1e-6, atol=1e-5)
    for parameter, gradient in alone.items():
        largest = float(gradient.abs().max())
        assert largest > 0, f"{parameter}: a zero gradient proves nothing"
        torch.testing.assert_close(shared[parameter], gradient, rtol=0, atol=1e-5 * largest)


@DTYPES
@pytest.mark.parametrize("name", long_but(("qwen2", "gemma2", "gpt_neox"), PACKED))
def test_the_check_passes_models_that_pack(name: str, dtype: torch.dtype) -> None:
    """No bit of a sequence depends on its neighbour's tokens, in bfloat16 neither, and the logits are the model's."""
    found = measured(tiny_model(PACKED[name], dtype=dtype, targets=TARGETS.get(name)))
    assert problem_of(found, dtype) is None, found
    assert found.before == 0.0
    assert found.own < 1e-5


@pytest.mark.filterwarnings("ignore:The following .*_pattern")  # PEFT's, of adapters on experts
@DTYPES
@pytest.mark.parametrize("count", [1, 3], ids=["one sequence", "more"])
@pytest.mark.parametrize("name", long_but(("mamba", "bloom", "lfm2"), LEAKS))
def test_the_check_refuses_models_that_leak(name: str, count: int, dtype: torch.dtype) -> None:
    """In both types, also where a step has but one sequence, which then stands beside itself."""
    model = tiny_model(LEAKS[name], dtype=dtype, b_std=0.0, targets=TARGETS.get(name))
    problem = problem_of(measured(model, count), dtype)
    assert problem is not None
    assert "leak into each other" in problem


@DTYPES
def test_the_smallest_leak_is_seen(dtype: torch.dtype) -> None:
    """LFM2 with the usual spread of weights: 0.0002 nats a response, a hundredth of what bfloat16 rounds away."""
    config = type(LEAKS["lfm2"])(**(LEAKS["lfm2"].to_dict() | {"initializer_range": 0.02}))
    found = measured(tiny_model(config, dtype=dtype, b_std=0.0))
    assert found.before < 5e-3
    assert "leak into each other" in str(problem_of(found, dtype))


@DTYPES
def test_a_wrong_factor_and_a_missing_cap_are_refused(dtype: torch.dtype) -> None:
    """Logits times 1.02, and Gemma 2's cap left out: no rounding of bfloat16 hides them."""
    for name, wrong in (("qwen2", LogitTransform(scale=1.02)), ("gemma2", LogitTransform())):
        model = tiny_model(PACKED[name], dtype=dtype)
        model.policy.get_base_model().get_output_embeddings().transform = wrong  # type: ignore[operator]
        assert "changes its logits" in str(problem_of(measured(model), dtype)), name


def gpt2_with(hook: Any, *, on: str, dtype: torch.dtype) -> Differences:
    """What is measured of GPT-2, whose positions are learned, with a hook before its decoder or its positions."""
    model = tiny_model(GPT2, dtype=dtype)
    decoder: Any = model.policy.get_base_model().get_decoder()  # type: ignore[operator]
    module = decoder if on == "decoder" else decoder.wpe
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return measured(model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@DTYPES
def test_wrong_positions_are_refused(dtype: torch.dtype) -> None:
    """Positions that begin at 7 differ from the model's own; positions that run on behind a neighbour, from a row
    alone, though no token attends to another sequence."""

    def shifted(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids")
        return args, kwargs | ({} if given is None else {"position_ids": given + 7})

    def run_on(_: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
        return (torch.arange(args[0].shape[-1])[None],), kwargs

    assert problem_of(gpt2_with(lambda _, args, kwargs: None, on="decoder", dtype=dtype), dtype) is None
    found = gpt2_with(shifted, on="decoder", dtype=dtype)
    assert "from the model's own forward" in str(problem_of(found, dtype))
    found = gpt2_with(run_on, on="positions", dtype=dtype)
    assert found.before == 0.0
    assert "positions do not restart" in str(problem_of(found, dtype))


def test_a_model_that_looks_ahead_is_refused() -> None:
    """What follows a sequence in its row may not change it: that would be taken for rounding."""
    found = Differences(own=0.0, packed=0.0, packed_rounding=0.0, before=0.1, after=0.1)
    assert "not causal" in str(problem_of(found, torch.float32))


def test_nan_is_refused() -> None:
    """Log-probs that are no numbers pass no comparison."""
    found = Differences(own=math.inf, packed=0.0, packed_rounding=0.0, before=0.0, after=0.0)
    assert problem_of(found, torch.bfloat16) is not None
