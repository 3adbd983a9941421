"""What is computed again in the backward pass changes no bit, and costs the operations and the memory that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import PACKED, TARGETS, sequences, tiny_policy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toy import logps_by_name

from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.reference import HowForwarded
from uft_ds.planning.activations import _Live
from uft_ds.streams.model import UFTModel
from uft_ds.streams.recompute import Recompute, enable_recompute

MODES: tuple[Recompute, ...] = (False, "selective", True)
BATCH = micro_batch(sequences(40, 17, 31))
FAMILIES = [
    ("llama", "lockstep"),
    ("gemma2", "lockstep"),
    ("qwen3", "lockstep"),
    ("mistral", "separate"),
    ("qwen2_moe", "separate"),
    ("cohere", "separate"),
    ("gemma2", "separate"),
]


def model_of(name: str, mode: Recompute, reference_mode: HowForwarded = "lockstep") -> UFTModel:
    policy = tiny_policy(PACKED[name], targets=TARGETS.get(name))
    base: Any = policy.get_base_model()
    base.train()
    enable_recompute(base, mode)
    return UFTModel(policy, reference_mode=reference_mode)


def step_of(model: UFTModel) -> tuple[Tensor, dict[str, Tensor]]:
    logps = logps_by_name(model, BATCH)
    (logps["policy"] - logps["reference"]).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.stack([logps["policy"].detach(), logps["reference"]]), gradients


@pytest.mark.parametrize(("name", "reference_mode"), FAMILIES)
def test_no_bit_depends_on_it(name: str, reference_mode: HowForwarded) -> None:
    """Log-probs of both streams and each adapter's gradient, also where attention has a matrix of scores (Gemma 2)."""
    (expected, gradients), *others = (step_of(model_of(name, mode, reference_mode)) for mode in MODES)
    for logps, of_adapters in others:
        assert torch.equal(logps, expected)
        assert of_adapters.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert torch.equal(of_adapters[parameter], gradient), parameter


def costs_of(name: str, mode: Recompute) -> tuple[float, float]:
    """Operations of the policy's forward and backward by torch's counter, and bytes held between the two."""
    model = model_of(name, mode)
    with FlopCounterMode(display=False) as counter:
        logps_by_name(model, BATCH, "policy")["policy"].sum().backward()
    model.zero_grad()
    with _Live() as live:
        weights = [parameter.detach() for parameter in model.parameters()]
        before = live.now
        logps = logps_by_name(model, BATCH, "policy")
        held = live.now - before
    del logps, weights
    return counter.get_total_flops(), held


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_selective_takes_the_operations_of_none_and_less_memory(name: str) -> None:
    """The adapters' second matrices are computed again, nothing else that counts; memory is between the other two."""
    (flops_of_none, bytes_of_none), (flops, held), (flops_of_all, bytes_of_all) = (costs_of(name, m) for m in MODES)
    assert flops_of_none <= flops <= 1.05 * flops_of_none
    assert flops_of_all > 1.2 * flops_of_none
    assert bytes_of_all < held < 0.9 * bytes_of_none


def test_another_linear_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's adds a bias in place, to the result that is kept: every gradient would be wrong."""
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: original(*given))
    with pytest.raises(ValueError, match="needs torch's own linear layer"):
        model_of("llama", "selective")
    model_of("llama", True)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    """By the recipe, with what is allowed."""
    from uft_ds.errors import UserError
    from uft_ds.recipe.file import load_recipe

    assert load_recipe("quickstart", ("model.gradient_checkpointing=selective",)).model.gradient_checkpointing == (
        "selective"
    )
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing.*selective"):
        load_recipe("quickstart", ("model.gradient_checkpointing=attention",))
    with pytest.raises(UserError, match=r"model\.activation_offload"):
        load_recipe("quickstart", ("model.gradient_checkpointing=selective", "model.activation_offload=true"))
