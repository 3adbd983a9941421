"""NF4 for the frozen linear layers of a base: 4 bits a weight and 8 bits a block of 64 (QLoRA, arXiv 2305.14314).

bitsandbytes has the format and the decoder. Two things are done here, because its own depend on the machine (0.50.2):

- Coding. Its kernels differ between devices, and the mean that its double quantisation subtracts depends on the number
  of threads (0.05190793 with one, 0.05190792 with two, of the same matrix). A model that is merged later, on another
  machine, must begin at the very weights that were trained on. So weights are coded by a few operations of torch that
  are exact on every device, and the mean is formed in float64. The codes are those of its kernel for CPUs.
- The product. Its `Linear4bit` packs the weight anew in evaluation mode, on CPUs with AVX512-BF16. Results then change
  in the last bits, and after a return to training mode no gradient passes the layer. Here the product is torch's own
  with the decoded weight, so a layer computes what it would in 16 bits with these weights, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from uft_ds.architectures.facts import decoder_layers
from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.packages import install_command

NF4 = "nf4"
"""What `model.quantization` calls it."""
MARK = "base_quantization.json"
"""A file beside an adapter, which says that it belongs on its base in NF4: PEFT's config has no field for it."""

BLOCK = 64
"""Weights that share a constant."""
SECOND_BLOCK = 256
"""Constants that share a constant of their own."""
LEAST_VERSION = "0.50.2"
"""The oldest bitsandbytes that the tests have seen."""

_WEIGHTS_AT_ONCE = BLOCK << 18
"""Coded at one time: 17 million, whose temporaries take 0.3 GB."""
_SMALLEST = 1e-38
"""What a block of zeros is divided by."""
_ROWS_COMPARED = 1024
_TABLES = 16 + 256
"""Values of the codes of weights, and of those of constants; each layer has its own."""
_LINEAR = torch._C._nn.linear
"""torch's own: DeepSpeed may have put another function in the place of `torch.nn.functional.linear`."""
_LEAST_SHARE = 0.9
"""Of the weights of the layers, what must be in linear layers."""


Whole = Callable[[Any], AbstractContextManager[Any]]
"""A context within which a parameter, which ZeRO-3 may have partitioned, is whole."""


@dataclass(frozen=True)
class Nf4Base:
    """A base whose linear layers are in NF4.

    dtype: the type that their values have before they are rounded, and after.
    """

    dtype: torch.dtype

    @property
    def mark(self) -> bytes:
        """The content of `MARK` beside an adapter that was trained on it."""
        content = {"quantization": NF4, "dtype": str(self.dtype).removeprefix("torch.")}
        return f"{json.dumps(content)}\n".encode()


def check_bitsandbytes() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        UserError: it is not installed, or too old; says how to install it.
    """
    how = f'pip install "uft_ds[{NF4}]", or {install_command(NF4)}'
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: {NF4} needs bitsandbytes, which is not installed: {how}")
    found = importlib.metadata.version("bitsandbytes")
    if Version(found) < Version(LEAST_VERSION):
        raise UserError(f"model.quantization: {NF4} needs bitsandbytes {LEAST_VERSION}, found {found}: {how}")


def linear_layers(base: Any) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of the layers that NF4 takes: the linear ones inside the decoder layers of a base, adapted or not.

    Embeddings, norms and the head stay as they are, and so does the part of a wrapper that reads images.
    """
    layers = decoder_layers(base.get_decoder())
    (place,) = (name for name, module in base.named_modules() if module is layers)
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            yield f"{place}.{name}", module


def check_can_be_nf4(base: Any) -> tuple[str, ...]:
    """Refuse a base of which NF4 would take little, such as a mixture of experts.

    Args:
        base: may be on the meta device; without adapters.
    Returns:
        the names of the weights that NF4 takes.
    Raises:
        UserError: names the share of the weights that it takes.
    """
    named = list(linear_layers(base))
    taken = sum(_size(module.weight) for _, module in named)
    total = sum(_size(parameter) for parameter in decoder_layers(base.get_decoder()).parameters())
    if taken < _LEAST_SHARE * total:
        raise UserError(
            f"model.quantization: {NF4} given, but of the weights in the layers of {type(base).__name__} only "
            f"{taken / total:.0%} are in linear layers, which it takes (the experts of a mixture are one parameter of "
            "three dimensions): leave it out, or take a model of another architecture"
        )
    return tuple(f"{name}.weight" for name, _ in named)


def _size(parameter: Any) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def num_weights(parameter: Any) -> int:
    """Number of weights that a parameter stands for: one in NF4 has half as many elements, of a byte each.

    Args:
        parameter: of any kind; ZeRO-3 may have partitioned it.
    """
    state = getattr(parameter, "quant_state", None)
    return _size(parameter) if state is None else int(state.shape.numel())


def quantise(base: Any, whole: Whole = nullcontext) -> None:
    """Hold the linear layers of a loaded base in NF4 from now on, in place. They are frozen.

    Args:
        whole: a context within which a parameter that ZeRO-3 has partitioned is whole. Its codes are whole, on the
            host, until the engine shards them.
    Raises:
        UserError: bitsandbytes is missing, or NF4 takes little of the base.
        CheckFailed: the GPU does not compute what the host does; see `check_device`.
    """
    check_bitsandbytes()
    check_can_be_nf4(base)
    if torch.cuda.is_available():
        _, first = next(linear_layers(base))
        with whole(first.weight):
            check_device(first.weight.detach(), torch.device("cuda"))
    for _, layer in linear_layers(base):
        is_divided = hasattr(layer.weight, "ds_id")
        with whole(layer.weight):
            weight = coded(layer.weight.detach())
        layer.weight = weight.to("cpu") if is_divided else weight
        layer.requires_grad_(False)
        layer.__class__ = Nf4Linear


def held_in_nf4(base: Any) -> Nf4Base | None:
    """What `quantise` has made of a base, with adapters or without; None if it is as it was loaded."""
    weights: Iterator[Any] = (module.weight for module in base.modules() if isinstance(module, Nf4Linear))
    return next((Nf4Base(weight.quant_state.dtype) for weight in weights), None)


def check_device(weight: Tensor, device: torch.device) -> None:
    """Refuse a device that codes or decodes a weight to other bits than the host: what is merged there would not be
    what was trained.

    Raises:
        CheckFailed: says what differs.
    """
    rows = weight[:_ROWS_COMPARED].to("cpu", copy=True)
    here, there = coded(rows, torch.device("cpu")), coded(rows, device).to(device)
    if not torch.equal(here.data, there.data.cpu()):
        differing = "codes"
    elif not torch.equal(decoded(here), decoded(there).cpu()):
        differing = "values"
    else:
        return
    raise CheckFailed(
        f"model.quantization: {NF4}: the {differing} of the first layer on {device} are not those of the host, bit for "
        "bit, so a merged model would not be the trained one; take another version of bitsandbytes"
    )


def constants_bytes(weights: int) -> int:
    """Bytes of what decodes a matrix of so many weights, besides its codes: constants, and theirs, and two tables."""
    blocks = -(-weights // BLOCK)
    return blocks + 4 * (-(-blocks // SECOND_BLOCK) + 1 + _TABLES)


def round_linear(base: Any, nf4: Nf4Base) -> None:
    """Give the linear layers of a loaded base the values of its NF4, in place and in the type that they have.

    Raises:
        UserError: as `quantise`.
    """
    check_bitsandbytes()
    check_can_be_nf4(base)
    for _, layer in linear_layers(base):
        layer.weight.data = rounded(layer.weight.detach(), nf4).to(layer.weight.dtype)


def coded(weight: Tensor, device: torch.device | None = None) -> Any:
    """A weight in NF4: a `bitsandbytes.nn.Params4bit`, on the weight's device.

    Args:
        weight: [out, in], float32 or bfloat16; finite.
        device: on which it is coded, to the same bits as on any other; None: a GPU if there is one. On a CPU a core
            takes a second for 14 million weights.
    """
    from bitsandbytes.nn import Params4bit

    functional = _functional()
    code = functional.get_4bit_type(NF4, device="cpu")
    middles = ((code[:-1] + code[1:]) / 2).to(
        device or torch.device("cuda" if torch.cuda.is_available() else weight.device)
    )
    parts = [_coded_part(part.to(middles.device), middles) for part in weight.reshape(-1).split(_WEIGHTS_AT_ONCE)]
    packed, largest = (torch.cat(of) for of in zip(*parts, strict=True))
    # On the CPU, whichever device the weight is on: these are 64 times fewer numbers.
    largest = largest.cpu()
    offset = largest.double().mean().float()
    constants, second = functional.quantize_blockwise(largest - offset, blocksize=SECOND_BLOCK)
    state = functional.QuantState(
        absmax=constants,
        shape=weight.shape,
        code=code,
        blocksize=BLOCK,
        quant_type=NF4,
        dtype=weight.dtype,
        offset=offset,
        state2=second,
    )
    state.to(weight.device)
    return Params4bit(
        packed[:, None].to(weight.device),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type=NF4,
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )


def _coded_part(weights: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a run of weights, two in a byte, and the largest absolute value of each block, float32."""
    numbers = nn.functional.pad(weights.float(), (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    largest = numbers.abs().amax(1)
    scaled = (numbers * (1 / largest.clamp(min=_SMALLEST))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(scaled.view(-1), middles, out_int32=True).to(torch.uint8)
    packed = (codes[::2] << 4) | codes[1::2]
    return packed[: (len(weights) + 1) // 2], largest


def decoded(weight: Any) -> Tensor:
    """The values of a weight in NF4: [out, in], in the type that it had before."""
    codes, state = weight.data, weight.quant_state
    if state.absmax.device != codes.device:  # ZeRO-3 moves the codes alone
        state.to(codes.device)
    values: Tensor = _functional().dequantize_4bit(codes, state)
    return values


def rounded(weight: Tensor, base: Nf4Base) -> Tensor:
    """What a weight becomes in an NF4 base: coded and decoded, bit for bit as in training; [out, in]."""
    return decoded(coded(weight.to(base.dtype)))


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is in NF4, and is decoded for each product, forward and backward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        result: Tensor = _Decoding.apply(input, self.weight, self.bias)
        return result


class _Decoding(Function):
    """Nothing is saved for the backward but the codes, which are there anyway: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        result: Tensor = _LINEAR(given, decoded(weight), bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        return gradient.matmul(decoded(ctx.weight)) if ctx.needs_input_grad[0] else None, None, None


@cache
def _functional() -> Any:
    """bitsandbytes' functions, imported where they are first needed: the package is an extra."""
    from bitsandbytes import functional

    return functional
