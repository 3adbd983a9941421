"""Attention without a mask: equal to transformers' own with a block-diagonal mask, and never of [tokens x tokens]."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from models import PACKED, TARGETS, sequences, tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import logps_by_name
from transformers import GPTJConfig, LlamaConfig
from transformers.models.gemma2 import modeling_gemma2

from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import UserError
from uft_ds.streams.load import attention_implementation
from uft_ds.streams.packed_attention import PACKED as PACKED_ATTENTION
from uft_ds.streams.packed_attention import _runs_varlen, bounds_for_attention, packed_attention

LENGTHS = (5, 1, 12, 7, 12)
ALONE, SHARED = (None,) * 5, (None, 0, 0, None, 3)
"""Whose prompt each segment follows: nobody's; and two segments that follow the first, one that follows the fourth."""
PROMPTS = pytest.mark.parametrize("prompt_of", [ALONE, SHARED], ids=["sequences", "shared prompts"])
HEADS, KEY_HEADS, HEAD = 4, 2, 8


class Attention(modeling_gemma2.Gemma2Attention):
    """A module as transformers hands it to its attention functions, without weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_key_value_groups, self.is_causal, self.head_dim = HEADS // KEY_HEADS, True, HEAD


Attention.__module__ = modeling_gemma2.__name__


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0) if device == "cpu" else None
    return [
        torch.randn(1, heads, sum(LENGTHS), HEAD, dtype=dtype, device=device, generator=generator, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def bounds(prompt_of: tuple[int | None, ...] = ALONE, device: str = "cpu") -> dict[str, Any]:
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    return bounds_for_attention(ends, LENGTHS, prompt_of)


def by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    prompt_of: tuple[int | None, ...] = ALONE,
    **options: Any,
) -> Tensor:
    """transformers' eager attention of the whole row, with a mask that keeps sequences apart."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    prompt = torch.tensor([-1 if of is None else of for of in prompt_of])[segment]
    begins = torch.tensor([0 if of is None else LENGTHS[of] for of in prompt_of])
    place = torch.cat([begin + torch.arange(length) for begin, length in zip(begins, LENGTHS, strict=True)])
    distance = place[:, None] - place[None, :]
    seen = ((segment[:, None] == segment[None, :]) | (prompt[:, None] == segment[None, :])) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    output: Tensor = modeling_gemma2.eager_attention_forward(Attention(), query, key, value, mask, **options)[0]
    return output


@PROMPTS
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4, 12])
def test_it_is_attention_with_a_block_diagonal_mask(
    window: int | None, softcap: float | None, prompt_of: tuple[int | None, ...]
) -> None:
    """Outputs and gradients, with grouped queries, sliding windows and capped scores."""
    options = {"scaling": 0.3, "softcap": softcap}
    found, expected = inputs(), inputs()
    ours, weights = packed_attention(Attention(), *found, None, sliding_window=window, **bounds(prompt_of), **options)
    theirs = by_mask(*expected, window, prompt_of, **options)
    assert weights is None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for output in (ours, theirs):
        (output * torch.arange(HEAD)).sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0) if sizes else self.numel
        return result


def test_no_tensor_grows_with_the_square_of_the_row() -> None:
    """Of a row of 3,000 tokens a mask alone would have 9 million elements."""
    model = tiny_model(PACKED["llama"])
    with Largest() as found:
        logps = logps_by_name(model, micro_batch(sequences(*[30] * 100)))
        logps["policy"].sum().backward()
    assert found.numel < 3000 * 3000 / 4


@pytest.mark.parametrize("name", [name for name in PACKED if name not in ("gptj", "codegen")])
def test_the_families_of_the_table_take_it(name: str) -> None:
    """And say so by the name that a run records."""
    assert attention_implementation("auto", torch.float32, PACKED[name]) == PACKED_ATTENTION
    model = tiny_model(PACKED[name], targets=TARGETS.get(name))
    assert model.attention == PACKED_ATTENTION


def test_others_do_not() -> None:
    """A family whose packed rows no test has seen, and one whose attention transformers cannot replace."""
    unknown = LlamaConfig()
    unknown.model_type = "never_seen"
    assert attention_implementation("auto", torch.float32, unknown, has_flash_attention=False) == "sdpa"
    assert attention_implementation("auto", torch.float32, GPTJConfig(), has_flash_attention=False) != PACKED_ATTENTION
    with pytest.raises(UserError, match="there is no packed for GPTJForCausalLM"):
        attention_implementation("packed", torch.float32, GPTJConfig())


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(HEADS)}, {"is_causal": False}])
def test_what_it_does_not_do_is_refused(asked: dict[str, Any]) -> None:
    """Attention sinks (gpt-oss), and attention to what follows: no number is better than a wrong one."""
    with pytest.raises(ValueError, match="packed attention"):
        packed_attention(Attention(), *inputs(), None, **bounds(), **asked)


def test_a_module_that_is_not_causal_is_refused() -> None:
    """As Gemma 3's with `use_bidirectional_attention`: transformers reads the module where no argument says it."""
    module = Attention()
    module.is_causal = False
    with pytest.raises(ValueError, match="is causal"):
        packed_attention(module, *inputs(), None, **bounds())


def varlen_stand_in(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """What torch documents of `varlen_attn`, slowly: (tokens, heads, head size), a window of keys to the left."""
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    left, right = options["window_size"]
    assert (right, options["enable_gqa"]) == (0, query.shape[1] != key.shape[1])
    outputs = []
    for (start, end), (first, last) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        parts = [query[start:end].transpose(0, 1), *(tensor[first:last].transpose(0, 1) for tensor in (key, value))]
        distance = torch.arange(last - first - (end - start), last - first)[:, None] - torch.arange(last - first)[None]
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=seen, scale=options["scale"], enable_gqa=options["enable_gqa"]
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@PROMPTS
@pytest.mark.parametrize("window", [None, 4])
def test_a_gpu_asks_the_varlen_kernel_for_the_same(
    window: int | None, prompt_of: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in that does what torch documents; the kernel itself has not run."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_stand_in)
    monkeypatch.setattr("uft_ds.streams.packed_attention._runs_varlen", lambda query: True)
    found, expected = inputs(), inputs()
    ours, _ = packed_attention(Attention(), *found, None, scaling=0.3, sliding_window=window, **bounds(prompt_of))
    theirs = by_mask(*expected, window, prompt_of, scaling=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@PROMPTS
@pytest.mark.parametrize("window", [None, 4])
def test_the_varlen_kernel_takes_what_it_is_given(
    window: int | None, prompt_of: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own operator, on fake tensors of a GPU: shapes, types and options."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        tensors = [tensor.detach() for tensor in inputs(torch.bfloat16, "cuda")]
        assert _runs_varlen(tensors[0])
        options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, **bounds(prompt_of, "cuda")}
        output, _ = packed_attention(Attention(), *tensors, None, **options)
        assert (output.shape, output.dtype) == ((1, sum(LENGTHS), HEADS, HEAD), torch.bfloat16)


def test_what_flash_attention_does_not_run_reaches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32; GPUs before Ampere; heads that are not a multiple of 8, or larger than 256."""
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def runs(head: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> bool:
        with FakeTensorMode():
            return _runs_varlen(torch.empty(1, HEADS, 3, head, dtype=dtype, device=device))

    assert runs(64)
    assert runs(256)
    assert not runs(64, torch.float32)
    assert not runs(64, device="cpu")
    assert not runs(36)
    assert not runs(264)
    capability = (7, 5)
    assert not runs(64)
