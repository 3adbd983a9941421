"""NF4: the codes of bitsandbytes on any machine, products of the decoded weights, and which layers are taken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from mixtures import build_mixture
from peft import PeftModel
from tiny import build_tiny_model
from torch import Tensor, nn
from toy import logps_by_name, saved_adapter, toy_model, toy_sequences
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from wrappers import build_wrapper

from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import CheckFailed, UserError
from uft_ds.streams import nf4 as of_nf4
from uft_ds.streams.load import check_base, empty_base, load_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.nf4 import (
    BLOCK,
    Nf4Base,
    Nf4Linear,
    check_bitsandbytes,
    check_can_be_nf4,
    check_device,
    coded,
    constants_bytes,
    decoded,
    quantise,
    rounded,
)


def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.fixture
def one_thread_again() -> Any:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 64), (33, 10), (300, 640), (1, 2)])
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes and constants bit for bit, also where the last block is not full; values to the rounding of the mean."""
    weight = matrix(*shape, dtype=dtype)
    ours = coded(weight)
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours.data, codes)
    assert torch.equal(ours.quant_state.absmax, state.absmax)
    assert decoded(ours).dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(decoded(ours), functional.dequantize_4bit(codes, state), rtol=rounding, atol=0)


def test_values_do_not_depend_on_the_number_of_threads(one_thread_again: None) -> None:
    """What is merged on another machine begins at the same bits. bitsandbytes' own mean does depend on it."""
    weight, found, theirs = matrix(1200, 2048, dtype=torch.float32), [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(rounded(weight, Nf4Base(torch.float32)))
        state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")[1]
        theirs.append(state.offset)
    assert torch.equal(*found)
    torch.testing.assert_close(*theirs, rtol=1e-5, atol=0)  # not equal in every release: why the mean is our own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_moves_by_no_more_than_half_a_gap(dtype: torch.dtype) -> None:
    """The widest gap of NF4 is 0.304 of a block's largest value; its constant is rounded to 8 bits besides (7%)."""
    weight = matrix(128, 128, dtype=dtype)
    largest = weight.float().view(-1, BLOCK).abs().amax(1, keepdim=True)
    error = (rounded(weight, Nf4Base(dtype)).float() - weight.float()).view(-1, BLOCK).abs()
    assert (error <= (0.152 + 0.07) * largest).all()
    assert error.max() > 0


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(4, 2 * BLOCK)
    weight[1, :BLOCK] = 1.0
    assert torch.equal(rounded(weight, Nf4Base(torch.float32)) != 0, weight != 0)


def test_bytes_of_a_weight_are_counted() -> None:
    """4 bits, and 8 bits a block of 64, and 32 bits 256 of these: 0.516 bytes a weight of a large matrix."""
    weight = coded(matrix(1024, 1024))
    state = weight.quant_state
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert sum(tensor.nbytes for tensor in tensors) == constants_bytes(1024 * 1024)
    assert (1 << 19) + constants_bytes(1 << 20) == pytest.approx(0.516 * (1 << 20), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_decoded_weight(dtype: torch.dtype, bias: bool) -> None:
    """Bit for bit, values and gradients, and the same after an evaluation; nothing but what is there is saved.

    bitsandbytes' own layer fails this on CPUs with AVX512-BF16 (0.50.2): once in evaluation mode, no gradient passes.
    """
    plain = nn.Linear(64, 96, bias=bias, dtype=dtype).requires_grad_(False)
    layer = nn.Linear(64, 96, bias=bias, dtype=dtype).requires_grad_(False)
    layer.load_state_dict(plain.state_dict())
    layer.weight = coded(plain.weight.detach())
    layer.__class__ = Nf4Linear
    plain.weight.data = decoded(layer.weight)
    given, upstream = matrix(5, 64, dtype=dtype, seed=1), matrix(5, 96, dtype=dtype, seed=2)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for mode in (True, False, True):
        layer.train(mode)
        with torch.no_grad():
            without = layer(given)
        rows, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = layer(rows)
        result.backward(upstream)
        expected = plain(theirs)
        expected.backward(upstream)
        assert torch.equal(result, expected)
        assert torch.equal(without, expected)
        assert torch.equal(rows.grad, theirs.grad)
    assert saved == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("nf4") / "base", "qwen2", tied=False)


def test_the_layers_are_taken_and_nothing_else(base: Path) -> None:
    """Every linear layer of the decoder; embedding, norms, biases and head keep their values and their type."""
    options: dict[str, Any] = {"revision": None, "attention": "auto", "gradient_checkpointing": False}
    plain = load_base(str(base), dtype=torch.bfloat16, **options)
    model = load_base(str(base), dtype=torch.bfloat16, quantization="nf4", **options)
    before = dict(plain.named_parameters())
    taken = {name for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    assert taken == {name for name, module in plain.model.layers.named_modules(prefix="model.layers")
                     if isinstance(module, nn.Linear)}  # fmt: skip
    assert {f"{name}.weight" for name in taken} == set(check_can_be_nf4(empty_base(check_base(str(base), None))))
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        if name.removesuffix(".weight") in taken and name.endswith(".weight"):
            assert torch.equal(decoded(parameter), rounded(before[name], Nf4Base(torch.bfloat16)))
        else:
            assert torch.equal(parameter, before[name])


def trained(model: UFTModel, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs of both streams, and the gradients of a loss of the policy's."""
    logps = logps_by_name(model, batch)
    (logps["policy"] - logps["reference"]).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: logps_R.detach() for name, logps_R in logps.items()}, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_mode_is_the_16_bit_model_of_the_decoded_weights(base: Path, dtype: torch.dtype) -> None:
    """Lockstep and separate, whatever is computed again: the same bits as a plain base that holds these weights."""
    batch = micro_batch(toy_sequences(4))
    expected_model = toy_model(base, dtype=dtype)
    rounding = Nf4Base(dtype)
    for name, module in expected_model.policy.get_base_model().model.layers.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            module.weight.data = rounded(module.weight.detach(), rounding)
    expected, expected_gradients = trained(expected_model, batch)
    modes: list[dict[str, Any]] = [
        {"reference_mode": "lockstep"},
        {"reference_mode": "separate"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective"},
    ]
    for options in modes:
        model = toy_model(base, dtype=dtype, quantization="nf4", **options)
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in expected_model.named_parameters():
            if name in adapters:  # PEFT rounds the start of A to the type of the base, which codes do not have
                adapters[name].data = parameter.detach().clone()
        found, gradients = trained(model, batch)
        for name in expected:
            assert torch.equal(found[name], expected[name]), options
        for name, gradient in expected_gradients.items():
            assert torch.equal(gradients[name], gradient), (options, name)


def test_values_and_gradients_are_those_of_peft_and_bitsandbytes(base: Path, tmp_path: Path) -> None:
    """The same batch through transformers' quantiser, PEFT's `lora.bnb.Linear4bit` and bitsandbytes' own products, in
    float32: log-probs and the gradients of every adapter."""
    adapter = saved_adapter(base, tmp_path / "adapter")
    model = toy_model(base, b_std=0.0, start_adapter=adapter, quantization="nf4")
    batch = micro_batch(toy_sequences(3))
    logps = logps_by_name(model, batch, "policy")["policy"]
    logps.sum().backward()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    peft = PeftModel.from_pretrained(theirs, str(adapter), is_trainable=True)
    peft.train()
    assert type(peft.get_submodule("base_model.model.model.layers.0.mlp.up_proj")).__name__ == "Linear4bit"
    total = torch.zeros(())
    found = []
    for sequence in toy_sequences(3):
        one = micro_batch([sequence])
        logits_TV = peft(input_ids=one.token_ids_T[None], use_cache=False).logits[0]
        logps_NV = logits_TV.index_select(0, one.predictors_N).log_softmax(dim=-1)
        token_logps_N = logps_NV.gather(1, one.targets_N[:, None]).squeeze(1)
        total = total + token_logps_N.sum()
        found += [token_logps_N[one.response_of_N == i].sum() for i in range(len(one.responses))]
    total.backward()
    torch.testing.assert_close(logps.float(), torch.stack(found), rtol=1e-4, atol=1e-4)
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    ours = {name.removeprefix("policy."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_of_a_wrapper_the_language_model_alone_is_taken(tmp_path: Path, name: str) -> None:
    model = load_base(
        str(build_wrapper(tmp_path, name)),
        revision=None,
        dtype=torch.float32,
        attention="auto",
        gradient_checkpointing=False,
        quantization="nf4",
    )
    taken = [name for name, module in model.named_modules() if isinstance(module, Nf4Linear)]
    assert len(taken) == 2 * 7
    assert all("language_model" in name for name in taken)
    assert any(isinstance(m, nn.Linear) and "vis" in name for name, m in model.named_modules())


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """transformers holds experts as one parameter of three dimensions, which bitsandbytes would leave in 16 bits."""
    model = empty_base(check_base(str(build_mixture(tmp_path, "qwen3_moe")), None))
    with pytest.raises(UserError, match=r"model.quantization: nf4 given, but .* only \d+% are in linear layers"):
        check_can_be_nf4(model)


@pytest.mark.parametrize("what", ["codes", "values"])
def test_a_device_that_computes_otherwise_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit on it: in a code, or in a value. The host agrees with itself."""
    weight, cpu, calls = matrix(64, 64), torch.device("cpu"), []
    check_device(weight, cpu)
    function = {"codes": coded, "values": decoded}[what]

    def changed_the_second_time(*args: Any) -> Any:
        calls.append(args)
        found = function(*args)
        if len(calls) == 2:
            found.data.view(torch.uint8)[0] ^= 1
        return found

    monkeypatch.setattr(of_nf4, function.__name__, changed_the_second_time)
    with pytest.raises(CheckFailed, match=rf"nf4: the {what} of the first layer on cpu are not those of the host"):
        check_device(weight, cpu)


def test_a_missing_package_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with the command that installs it, for a run and for a conversion, instead of another computation."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(UserError, match=r'needs bitsandbytes, which is not installed: pip install "uft_ds\[nf4\]"'):
        quantise(nn.Module())
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.49.0")
    with pytest.raises(UserError, match=r"needs bitsandbytes 0\.50\.2, found 0\.49\.0"):
        check_bitsandbytes()
