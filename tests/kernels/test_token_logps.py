"""Three-way numerics: the truth in float64, the definition in the low precision, the kernel in the low precision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from uft_ds.kernels.naive import naive_token_logps
from uft_ds.kernels.token_logps import attach, logps_and_gradients, token_logps

SHAPES = [(1, 1, 2), (1, 16, 31), (7, 13, 97), (64, 32, 128), (127, 61, 1009), (3, 96, 2053)]
"""(N, D, V): one row, primes, powers of two, a vocabulary far larger than the rest."""

DTYPES = [torch.float32, torch.bfloat16]

EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative."""

SLACK = {torch.float32: 4.0, torch.bfloat16: 0.5}
"""Of the largest gradient, in EPSILON: float32 sums a vocabulary, bfloat16 is rounded after a float32 sum."""


@dataclass(frozen=True)
class Case:
    """The inputs of one call. Logits have a standard deviation of about 3, as those of trained models."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    bias_V: Tensor | None
    upstream_N: Tensor


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, *, with_bias: bool = False, seed: int = 0) -> Case:
    num_tokens, dim, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(num_tokens, dim, generator=generator).to(dtype),
        (torch.randn(vocabulary, dim, generator=generator) * 3 / dim**0.5).to(dtype),
        torch.randint(vocabulary, (num_tokens,), generator=generator),
        torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None,
        torch.randn(num_tokens, generator=generator),
    )


def chunk_of(rows: int, vocabulary: int) -> int:
    """The `chunk_bytes` that makes chunks of `rows` rows."""
    return rows * 4 * vocabulary


def naive(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs and d (upstream . log-probs) / d hidden by autograd through the definition, all in `dtype`."""
    hidden_ND = case.hidden_ND.clone().to(dtype).requires_grad_()
    bias_V = None if case.bias_V is None else case.bias_V.to(dtype)
    logps_N = naive_token_logps(hidden_ND, case.weight_VD.to(dtype), case.targets_N, bias_V)
    logps_N.backward(case.upstream_N.to(dtype))
    assert hidden_ND.grad is not None
    return logps_N.detach(), hidden_ND.grad


def ours(case: Case, **options: int) -> tuple[Tensor, Tensor]:
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    logps_N, _ = token_logps(hidden_ND, case.weight_VD, case.targets_N, bias_V=case.bias_V, **options)
    logps_N.backward(case.upstream_N)
    assert hidden_ND.grad is not None
    return logps_N.detach(), hidden_ND.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_larger_than_the_definitions_own(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    """Against float64 on the same inputs, values and gradients err no more than plain torch in the same dtype.

    The slack: a value is a float32 difference of two numbers of order 10, whatever the inputs' dtype; a gradient is
    a float32 sum over the vocabulary in another order, or is rounded to bfloat16.
    """
    case = make_case(shape, dtype, with_bias=with_bias)
    true_logps_N, true_grad_ND = naive(case, torch.float64)
    plain_logps_N, plain_grad_ND = naive(case, dtype)
    logps_N, grad_ND = ours(case, chunk_bytes=chunk_of(5, shape[2]))
    assert logps_N.dtype == torch.float32
    assert grad_ND.dtype == dtype

    plain_error = (plain_logps_N.double() - true_logps_N).abs().max()
    error = (logps_N.double() - true_logps_N).abs().max()
    assert error <= plain_error + 16 * EPSILON[torch.float32]

    plain_error = (plain_grad_ND.double() - true_grad_ND).abs().max()
    error = (grad_ND.double() - true_grad_ND).abs().max()
    assert error <= plain_error + SLACK[dtype] * EPSILON[dtype] * true_grad_ND.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_log_probs_are_as_good_as_float32(shape: tuple[int, int, int]) -> None:
    """Only the inputs are rounded: given those, bfloat16 log-probs lie within 1e-5 nats of float64."""
    case = make_case(shape, torch.bfloat16)
    torch.testing.assert_close(ours(case)[0].double(), naive(case, torch.float64)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 126, 127, 128])
def test_chunk_size_does_not_matter(rows: int, dtype: torch.dtype) -> None:
    """Chunks of 1 to 128 of 127 rows, the last one ragged, give what one chunk gives, to float32 rounding.

    float32 sums of 1009 terms run in another order; a bfloat16 gradient may round the other way: one unit in its
    last place.
    """
    case = make_case((127, 61, 1009), dtype, with_bias=True)
    whole_logps_N, whole_grad_ND = ours(case)
    logps_N, grad_ND = ours(case, chunk_bytes=chunk_of(rows, 1009))
    torch.testing.assert_close(logps_N, whole_logps_N, rtol=0, atol=64 * EPSILON[torch.float32])
    slack = 4 * SLACK[dtype] * EPSILON[dtype] * float(whole_grad_ND.abs().max())
    torch.testing.assert_close(grad_ND, whole_grad_ND, rtol=2 * EPSILON[dtype], atol=slack)


def test_a_chunk_holds_one_row_at_least() -> None:
    """A vocabulary larger than `chunk_bytes` is done row by row, not refused or looped over for ever."""
    case = make_case((3, 8, 101), torch.float32)
    torch.testing.assert_close(ours(case, chunk_bytes=1), ours(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
def test_equal_reference_rows_give_exactly_equal_log_probs(rows: int, dtype: torch.dtype) -> None:
    """Invariant 1 rests on it: the same rows in both streams differ by exactly 0.0, however they are chunked."""
    case = make_case((127, 61, 1009), dtype)
    logps_N, reference_logps_N = token_logps(
        case.hidden_ND.clone().requires_grad_(),
        case.weight_VD,
        case.targets_N,
        reference_hidden_ND=case.hidden_ND.clone(),
        chunk_bytes=chunk_of(rows, 1009),
    )
    assert reference_logps_N is not None
    assert torch.equal(logps_N, reference_logps_N)
    assert logps_N.requires_grad
    assert not reference_logps_N.requires_grad


def test_the_reference_is_computed_from_its_own_rows() -> None:
    """Each stream's log-probs are what a call with that stream alone gives, bit for bit."""
    case, other = (make_case((29, 17, 101), torch.float32, seed=seed) for seed in (0, 1))
    policy_N, reference_N = token_logps(
        case.hidden_ND, case.weight_VD, case.targets_N, reference_hidden_ND=other.hidden_ND, bias_V=case.bias_V
    )
    alone_N, nothing = token_logps(other.hidden_ND, case.weight_VD, case.targets_N)
    assert nothing is None
    assert reference_N is not None
    assert torch.equal(reference_N, alone_N)
    assert torch.equal(policy_N, token_logps(case.hidden_ND, case.weight_VD, case.targets_N)[0])
    assert not torch.allclose(policy_N, reference_N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_give_no_log_probs_and_a_zero_gradient(dtype: torch.dtype) -> None:
    """A rank with nothing to do still has a graph: N = 0 gives [0] values, and zeros reach what lies below."""
    case = make_case((4, 8, 31), dtype, with_bias=True)
    hidden_TD = case.hidden_ND.clone().requires_grad_()
    none_N = torch.zeros(0, dtype=torch.int64)
    logps_N, reference_logps_N = token_logps(
        hidden_TD[none_N], case.weight_VD, none_N, reference_hidden_ND=case.hidden_ND[none_N], bias_V=case.bias_V
    )
    assert logps_N.shape == (0,)
    assert reference_logps_N is not None
    assert reference_logps_N.shape == (0,)
    (logps_N.sum() * 0.0).backward()
    assert hidden_TD.grad is not None
    assert torch.equal(hidden_TD.grad, torch.zeros_like(hidden_TD))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits 1e4, 0, -1e4: log-probs 0, -1e4, -2e4 (exp would overflow at 89), gradients w_target - w_best.

    2^13 = 8192 stands for 1e4: it is a bfloat16 number, so the arithmetic is exact.
    """
    big = 8192.0
    weight_VD = torch.tensor([[big, 0.0], [0.0, 1.0], [-big, 0.0]]).to(dtype)
    hidden_ND = torch.tensor([[1.0, 0.0]] * 3).to(dtype).requires_grad_()
    logps_N, _ = token_logps(hidden_ND, weight_VD, torch.tensor([0, 1, 2]))
    assert torch.equal(logps_N, torch.tensor([0.0, -big, -2 * big]))
    logps_N.sum().backward()
    assert hidden_ND.grad is not None
    assert torch.equal(hidden_ND.grad, (weight_VD - weight_VD[0]))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_equal_extreme_logits_share_the_probability(scale: float) -> None:
    """Four logits of 1e4 (or -1e4) are four probabilities of 1/4: -log 4, to float32 rounding at 1e4 (1e-3)."""
    logps_N, _ = token_logps(torch.ones(1, 1), torch.full((4, 1), scale), torch.tensor([2]))
    assert float(logps_N) == pytest.approx(-1.3862943611, abs=1e-3)


def test_backward_twice_gives_twice_the_gradient() -> None:
    """With `retain_graph` a second backward adds the same gradient again: nothing saved is changed in place."""
    case = make_case((7, 13, 97), torch.float32)
    once_ND = ours(case)[1]
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    logps_N, _ = token_logps(hidden_ND, case.weight_VD, case.targets_N)
    logps_N.backward(case.upstream_N, retain_graph=True)
    logps_N.backward(case.upstream_N)
    assert hidden_ND.grad is not None
    assert torch.equal(hidden_ND.grad, 2 * once_ND)


def test_a_second_derivative_is_refused() -> None:
    """The stored row gradients are constants to autograd: a derivative of them would be wrong without a word."""
    case = make_case((7, 13, 97), torch.float32)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    logps_N, _ = token_logps(hidden_ND, case.weight_VD, case.targets_N)
    (grad_ND,) = torch.autograd.grad(logps_N.square().sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_ND.sum().backward()


def test_gradient_is_the_slope() -> None:
    """Central differences of the values themselves, along 20 directions: no autograd in the comparison.

    float32 with a step of 1e-2: curvature 1e-4 and rounding 1e-6 / 1e-2 stay under 1e-3 of the slopes.
    """
    case = make_case((11, 7, 53), torch.float32, with_bias=True)
    _, gradients_ND, _ = logps_and_gradients(case.hidden_ND, case.weight_VD, case.targets_N, bias_V=case.bias_V)
    generator = torch.Generator().manual_seed(3)
    step = 1e-2
    for _ in range(20):
        direction_ND = torch.nn.functional.normalize(torch.randn(11, 7, generator=generator))
        above_N, below_N = (
            logps_and_gradients(
                case.hidden_ND + sign * step * direction_ND, case.weight_VD, case.targets_N, bias_V=case.bias_V
            )[0]
            for sign in (1, -1)
        )
        slopes_N = (above_N - below_N) / (2 * step)
        torch.testing.assert_close((gradients_ND * direction_ND).sum(-1), slopes_N, rtol=0, atol=2e-3)


def test_inputs_are_left_as_they_were_and_the_head_gets_no_gradient() -> None:
    """The logits' memory is reused in place; hidden states, weight, bias and targets are not touched."""
    case = make_case((7, 13, 97), torch.float32, with_bias=True)
    before = make_case((7, 13, 97), torch.float32, with_bias=True)
    weight_VD = case.weight_VD.requires_grad_()
    hidden_ND = case.hidden_ND.requires_grad_()
    logps_N, _ = token_logps(hidden_ND, weight_VD, case.targets_N, bias_V=case.bias_V, reference_hidden_ND=hidden_ND)
    logps_N.sum().backward()
    assert weight_VD.grad is None
    for name in ("hidden_ND", "weight_VD", "targets_N", "bias_V"):
        assert torch.equal(getattr(case, name), getattr(before, name)), name


def test_attach_scales_rows_by_the_gradient_from_above() -> None:
    """By hand: rows (1, 2) and (3, 4), upstream 10 and -1: gradients (10, 20) and (-3, -4)."""
    hidden_ND = torch.zeros(2, 2, requires_grad=True)
    logps_N = attach(hidden_ND, torch.tensor([-0.5, -0.25]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert logps_N.tolist() == [-0.5, -0.25]
    logps_N.backward(torch.tensor([10.0, -1.0]))
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.tolist() == [[10.0, 20.0], [-3.0, -4.0]]
