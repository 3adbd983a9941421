"""Linear layers: torch's values and gradients, and no more saved than these need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny_model
from torch import Tensor, nn
from toy import logps_by_name, toy_model, toy_sequences

from uft_ds.data.micro_batch import micro_batch
from uft_ds.streams import model as of_model
from uft_ds.streams.linear import LeanAdapter, LeanLinear, enable_lean_linear


def saved_by(function: Any, weights: list[nn.Parameter]) -> tuple[Any, list[Tensor]]:
    """A function's result, and the tensors that autograd keeps for its backward, each storage once, weights aside."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), list(kept.values())


def layer(dtype: torch.dtype, *, trained: bool, bias: bool) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(12, 20, bias=bias, dtype=dtype).requires_grad_(trained)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_values_and_gradients_are_torchs(trained: bool, bias: bool, shape: tuple[int, ...]) -> None:
    """In float64 to its rounding; the result bit for bit."""
    given = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(*shape[:-1], 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for kind in (nn.Linear, LeanLinear):
        module, rows = layer(torch.float64, trained=trained, bias=bias), given.clone().requires_grad_()
        module.__class__ = kind
        result = module(rows)
        result.backward(upstream)
        found.append((result.detach(), rows.grad, *(parameter.grad for parameter in module.parameters())))
    assert torch.equal(found[0][0], found[1][0])
    for expected, gradient in zip(*found, strict=True):
        assert (expected is None) == (gradient is None) == (not trained and expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("of_rows", "of_weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_an_adapter_converts_its_input_as_peft_does(of_rows: torch.dtype, of_weight: torch.dtype) -> None:
    """To a wider type or a narrower one: result, and gradients of both, bit for bit those of converting by hand."""
    given = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(of_rows)
    found = []
    for by_hand in (False, True):
        module, rows = layer(of_weight, trained=True, bias=False), given.clone().requires_grad_()
        module.__class__ = LeanAdapter
        result = module(rows.to(of_weight) if by_hand else rows)
        result.square().sum().backward()
        found.append((result.detach(), rows.grad, module.weight.grad))
    assert all(map(torch.equal, *found))
    assert found[0][0].dtype == of_weight
    assert found[0][1].dtype == of_rows


def test_a_layer_of_the_base_never_rounds_its_input() -> None:
    """float32 rows into bfloat16 weights: refused, as by torch's own layer."""
    module = layer(torch.bfloat16, trained=False, bias=False)
    module.__class__ = LeanLinear
    with pytest.raises(RuntimeError, match="same dtype"):
        module(torch.randn(3, 12))


def test_a_frozen_layer_saves_nothing_but_its_weight() -> None:
    """And a trained one its input as it came."""
    rows = torch.randn(7, 12).bfloat16().requires_grad_()
    for trained in (False, True):
        module = layer(torch.float32, trained=trained, bias=True)
        module.__class__ = LeanAdapter
        _, kept = saved_by(lambda module=module: module(rows), list(module.parameters()))
        assert [tensor.data_ptr() for tensor in kept] == ([rows.data_ptr()] if trained else [])


def test_adapters_that_read_one_tensor_keep_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 adapters on a bfloat16 base: a step keeps no float32 copy of what a linear layer reads, with the same
    log-probs and gradients bit for bit as with PEFT's own conversions and torch's own layers."""
    folder, batch = build_tiny_model(tmp_path, "qwen2"), micro_batch(toy_sequences(6, longest=120))
    found: list[Any] = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(of_model, "enable_lean_linear", lambda decoder: None)
        model = toy_model(folder, dtype=torch.bfloat16, gradient_checkpointing=False)
        logps, kept = saved_by(lambda model=model: logps_by_name(model, batch), list(model.parameters()))
        logps["policy"].sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        wide = sum(t.nbytes for t in kept if t.dtype == torch.float32 and t.shape[-1] in (64, 96))
        found.append((wide, logps, gradients, sum(tensor.nbytes for tensor in kept)))
    (lean_wide, lean_logps, lean_gradients, lean_bytes), (wide, logps, gradients, all_bytes) = found
    assert all(torch.equal(lean_logps[name], logps[name]) for name in logps)
    assert all(map(torch.equal, lean_gradients, gradients))
    layers, rows = 2, len(batch.token_ids_T)
    assert wide - lean_wide >= layers * 4 * rows * (5 * 64 + 64 + 96)  # what q, k, v, gate, up, o and down read
    assert lean_bytes < 0.65 * all_bytes


def test_every_plain_layer_is_lean_and_other_kinds_stay(tmp_path: Path) -> None:
    model = toy_model(build_tiny_model(tmp_path, "qwen2"))
    decoder: Any = model.policy.get_base_model().get_decoder()
    assert {type(module) for module in decoder.modules() if isinstance(module, nn.Linear)} == {LeanLinear, LeanAdapter}

    class Own(nn.Linear):
        """Of a model, with a forward of its own."""

    other = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    enable_lean_linear(other)
    assert [type(module) for module in other] == [Own, LeanLinear]
