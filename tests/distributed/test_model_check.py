"""The check of a model before the first step, on sharded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from suites import long_but
from torch import Tensor
from toy import toy_step

from uft_ds.errors import CheckFailed
from uft_ds.training.model_check import Differences, check_model


def remembering(_: Any, __: Any, hidden_1TD: Tensor) -> Tensor:
    """A hundredth of the mean of all tokens so far, whichever sequence they are of: a state along the row."""
    count_T1 = torch.arange(1, hidden_1TD.shape[1] + 1, dtype=hidden_1TD.dtype)[:, None]
    mean_1TD: Tensor = hidden_1TD.cumsum(dim=1) / count_T1
    return hidden_1TD + 0.01 * mean_1TD


def checked(folder: Path, leaks: bool) -> Differences | str:
    engine = engine_of(folder, reference_mode="separate", dtype=torch.bfloat16, lora_dtype=torch.bfloat16)
    base: Any = engine.module.policy.get_base_model()  # type: ignore[union-attr, operator]
    if leaks:
        base.get_decoder().layers[1].register_forward_hook(remembering)
    try:
        return check_model(engine, toy_step(), dtype=torch.bfloat16)
    except CheckFailed as error:
        return str(error)


@pytest.mark.parametrize("leaks", long_but([True], [False, True]), ids=["as it is", "with a state"])
def test_all_ranks_pass_or_refuse_alike(tiny_qwen2: Path, leaks: bool) -> None:
    """Two ranks under ZeRO-3: the same differences, or the same refusal with the model's class."""
    first, second = run_on_ranks(checked, 2, tiny_qwen2, leaks)
    assert first == second
    if leaks:
        assert "model.base: Qwen2ForCausalLM: before the first step a sequence's log-probs change by" in first
        assert "leak into each other" in first
    else:
        assert isinstance(first, Differences)
        assert first.before == 0.0
