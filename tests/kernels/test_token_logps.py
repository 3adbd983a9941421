"""Three-way numerics: the truth in float64, the definition in the low precision, the kernel in the low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EPSILON,
    SHAPES,
    SLACK,
    TILED,
    TRANSFORMS,
    WHOLE,
    Case,
    chunk_of,
    logps_and_statistics,
    make_case,
    naive,
    ours,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.naive import naive_logits, naive_token_logps
from uft_ds.kernels.token_logps import IGNORED, token_logps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_not_larger_than_the_definitions_own(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    """Against float64 on the same inputs, values and gradients err no more than plain torch in the same dtype.

    The slack: a value is a float32 difference of two numbers of up to 16, whatever the inputs' dtype, each rounded
    by a matmul in its own order (two units in the last place); a gradient is a float32 sum over the vocabulary in
    another order, or is rounded to bfloat16.
    """
    case = make_case(shape, dtype, with_bias=with_bias)
    true_logps_N, true_grad_ND = naive(case, torch.float64)
    plain_logps_N, plain_grad_ND = naive(case, dtype)
    logps_N, grad_ND = ours(case, chunk_bytes=chunk_of(5, shape[2]))
    assert logps_N.dtype == torch.float32
    assert grad_ND.dtype == dtype

    plain_error = (plain_logps_N.double() - true_logps_N).abs().max()
    error = (logps_N.double() - true_logps_N).abs().max()
    assert error <= plain_error + 32 * EPSILON[torch.float32]

    plain_error = (plain_grad_ND.double() - true_grad_ND).abs().max()
    error = (grad_ND.double() - true_grad_ND).abs().max()
    assert error <= plain_error + SLACK[dtype] * EPSILON[dtype] * true_grad_ND.abs().max()


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 256, 8192), (17, 1024, 4099)], ids=str)
def test_half_precision_inputs_give_float32_log_probs(
    shape: tuple[int, int, int], dtype: torch.dtype, chunk_bytes: int
) -> None:
    """Only the inputs are rounded: given those, log-probs lie within 1e-5 + 1e-6 |logp| nats of float64.

    Libraries that round logits or log-probs to bfloat16 err by 1e-2 and more.
    """
    case = make_case(shape, dtype)
    true_N = naive(case, torch.float64)[0]
    logps_N = ours(case, chunk_bytes=chunk_bytes)[0]
    assert ((logps_N.double() - true_N).abs() <= 1e-5 + 1e-6 * true_N.abs()).all()


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_float64_is_the_definition_to_float64(
    trainable: bool, with_bias: bool, options: dict[str, float], chunk_bytes: int
) -> None:
    """The algebra without rounding: values, all gradients, entropy and reference to 1e-12."""
    case, other = (make_case((37, 13, 211), torch.float64, with_bias=with_bias, seed=seed) for seed in (0, 1))
    inputs = [case.hidden_ND.requires_grad_()]
    if trainable:
        inputs += [tensor.requires_grad_() for tensor in (case.weight_VD, case.bias_V) if tensor is not None]
    true_N = naive_token_logps(case.hidden_ND, case.weight_VD, case.targets_N, case.bias_V, **options)
    head = Head(case.weight_VD, case.bias_V, LogitTransform(**options), chunk_bytes)
    (logps_N, reference_N), (statistics, of_reference) = logps_and_statistics(
        [case.hidden_ND, other.hidden_ND], head, case.targets_N
    )
    exactly: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(logps_N, true_N, **exactly)
    true_reference_N = naive_token_logps(other.hidden_ND, case.weight_VD, case.targets_N, case.bias_V, **options)
    torch.testing.assert_close(reference_N, true_reference_N, **exactly)
    upstream_N = case.upstream_N.double()
    true_grads = torch.autograd.grad(true_N, inputs, upstream_N)
    for grad, true_grad in zip(torch.autograd.grad(logps_N, inputs, upstream_N), true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, **exactly)
    for hidden_ND, found in ((case.hidden_ND, statistics), (other.hidden_ND, of_reference)):
        logits_NV = naive_logits(hidden_ND, case.weight_VD, case.bias_V, **options)
        true_entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
        torch.testing.assert_close(found.entropy_N, true_entropy_N, **exactly)
        assert torch.equal(found.is_top1_N, logits_NV.argmax(1) == case.targets_N)
        assert not found.entropy_N.requires_grad


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradcheck(trainable: bool, options: dict[str, float], chunk_bytes: int) -> None:
    """torch's own finite differences, in float64."""
    case = make_case((5, 4, 23), torch.float64, with_bias=True)
    tensors = (case.hidden_ND, case.weight_VD, case.bias_V)
    hidden_ND, weight_VD, bias_V = (tensor.requires_grad_(trainable) for tensor in tensors if tensor is not None)

    def logps(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        transform = LogitTransform(**options)
        return token_logps(
            hidden_ND, weight_VD, case.targets_N, bias=bias_V, transform=transform, chunk_bytes=chunk_bytes
        )[0]

    assert torch.autograd.gradcheck(logps, (hidden_ND.requires_grad_(), weight_VD, bias_V))


@given(
    num_tokens=st.integers(0, 70),
    dim=st.integers(1, 33),
    vocabulary=st.integers(1, 400),
    chunk_bytes=st.integers(1, 2**18),
    asked=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    trainable=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(
    num_tokens: int,
    dim: int,
    vocabulary: int,
    chunk_bytes: int,
    asked: float,
    dtype: torch.dtype,
    trainable: bool,
    seed: int,
) -> None:
    """Log-probs of asked rows to 1e-5 of float64, 0 and no gradient for the others; equal reference rows exactly 0."""
    case = make_case((num_tokens, dim, vocabulary), dtype, seed=seed)
    is_asked_N = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < asked
    targets_N = torch.where(is_asked_N, case.targets_N, IGNORED)
    hidden_ND, weight_VD = case.hidden_ND.clone().requires_grad_(), case.weight_VD.clone().requires_grad_(trainable)
    logps_N, reference_N = token_logps(
        hidden_ND, weight_VD, targets_N, others_ND=[case.hidden_ND], chunk_bytes=chunk_bytes
    )
    assert torch.equal(logps_N, reference_N)
    (logps_N * case.upstream_N).sum().backward()

    exact = [case.hidden_ND.double().requires_grad_(), case.weight_VD.double().requires_grad_()]
    true_N = naive_token_logps(*exact, case.targets_N)
    (true_N * case.upstream_N * is_asked_N).sum().backward()
    true_N = torch.where(is_asked_N, true_N, 0.0)
    assert ((logps_N - true_N).abs() <= 1e-5 + 1e-6 * true_N.abs()).all()
    grads = [hidden_ND.grad, weight_VD.grad] if trainable else [hidden_ND.grad]
    # A gradient sums terms of upstream * (the other factor) in float32, which may cancel; in bfloat16 the result is
    # rounded, a row of the hidden states' once more when it is scaled.
    rounding = 2 * EPSILON[dtype] if dtype == torch.bfloat16 else 0.0
    largest_upstream = float(case.upstream_N.abs().max()) if num_tokens else 0.0
    for grad, inputs, other, terms in zip(grads, exact, reversed(exact), (1, num_tokens), strict=False):
        assert grad is not None
        assert inputs.grad is not None
        if grad.numel() and other.numel():
            largest_term = largest_upstream * float(other.detach().abs().max()) * terms
            bound = 64 * EPSILON[torch.float32] * largest_term + rounding * float(inputs.grad.abs().max())
            torch.testing.assert_close(grad.double(), inputs.grad, rtol=0, atol=bound)
    assert hidden_ND.grad is not None
    assert not hidden_ND.grad[~is_asked_N].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 126, 127, 128, 192, 1000])
def test_chunk_size_does_not_matter(rows: int, dtype: torch.dtype) -> None:
    """Tiles of 16 columns to 192 whole rows of 300, the last one ragged, give what one chunk gives, to rounding.

    float32 sums of 1009 terms run in another order; a bfloat16 gradient may round the other way: one unit in its
    last place.
    """
    case = make_case((300, 61, 1009), dtype, with_bias=True)
    whole_logps_N, whole_grad_ND = ours(case, chunk_bytes=WHOLE)
    logps_N, grad_ND = ours(case, chunk_bytes=chunk_of(rows, 1009))
    torch.testing.assert_close(logps_N, whole_logps_N, rtol=0, atol=64 * EPSILON[torch.float32])
    slack = 4 * SLACK[dtype] * EPSILON[dtype] * float(whole_grad_ND.abs().max())
    torch.testing.assert_close(grad_ND, whole_grad_ND, rtol=2 * EPSILON[dtype], atol=slack)


def test_however_little_memory_is_allowed_it_is_done() -> None:
    """One byte for logits is not refused or looped over for ever."""
    case = make_case((3, 8, 101), torch.float32)
    torch.testing.assert_close(ours(case, chunk_bytes=1), ours(case))


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
def test_the_order_of_rows_does_not_matter(chunk_bytes: int) -> None:
    """Shuffled rows give shuffled results: nothing passes from one token to another."""
    case = make_case((127, 61, 1009), torch.float32)
    order_N = torch.randperm(127, generator=torch.Generator().manual_seed(4))
    shuffled = Case(case.hidden_ND[order_N], case.weight_VD, case.targets_N[order_N], None, case.upstream_N[order_N])
    rounding: dict[str, Any] = {"rtol": 0, "atol": 64 * EPSILON[torch.float32]}
    for ours_shuffled, ours_plain in zip(
        ours(shuffled, chunk_bytes=chunk_bytes), ours(case, chunk_bytes=chunk_bytes), strict=True
    ):
        torch.testing.assert_close(ours_shuffled, ours_plain[order_N], **rounding)


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_same_call_gives_the_same_bits(trainable: bool, chunk_bytes: int) -> None:
    """Values and gradients of two calls are equal bit for bit."""
    results = []
    for _ in range(2):
        case = make_case((127, 61, 1009), torch.bfloat16, with_bias=True)
        inputs = [case.hidden_ND.requires_grad_()]
        if trainable:
            inputs.append(case.weight_VD.requires_grad_())
        (logps_N,) = token_logps(
            case.hidden_ND, case.weight_VD, case.targets_N, bias=case.bias_V, chunk_bytes=chunk_bytes
        )
        results.append([logps_N, *torch.autograd.grad(logps_N, inputs, case.upstream_N)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
def test_equal_reference_rows_give_exactly_equal_log_probs(rows: int, dtype: torch.dtype) -> None:
    """Invariant 1 rests on it: the same rows in both streams differ by exactly 0.0, however they are chunked."""
    case = make_case((127, 61, 1009), dtype)
    logps_N, reference_logps_N = token_logps(
        case.hidden_ND.clone().requires_grad_(),
        case.weight_VD,
        case.targets_N,
        others_ND=[case.hidden_ND.clone()],
        chunk_bytes=chunk_of(rows, 1009),
    )
    assert torch.equal(logps_N, reference_logps_N)
    assert logps_N.requires_grad
    assert not reference_logps_N.requires_grad


@pytest.mark.parametrize("rows", [1, 64, 1000])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_streams_change_no_bit_of_any(dtype: torch.dtype, trainable: bool, rows: int) -> None:
    """Invariant 9 rests on it: a stream's log-probs, statistics and gradients are those of one or two streams."""
    cases = [make_case((127, 61, 1009), dtype, seed=seed) for seed in range(4)]
    first, weight_VD = cases[0].hidden_ND.requires_grad_(), cases[0].weight_VD.requires_grad_(trainable)
    inputs = [first, weight_VD] if trainable else [first]

    def results(count: int) -> list[list[Tensor]]:
        hidden_states = [first, *(case.hidden_ND for case in cases[1:count])]
        head = Head(weight_VD, chunk_bytes=chunk_of(rows, 1009))
        logps, statistics = logps_and_statistics(hidden_states, head, cases[0].targets_N)
        gradients = torch.autograd.grad(logps[0], inputs, cases[0].upstream_N)
        return [
            [logps[0], *statistics[0], *gradients],
            *([a, *b] for a, b in zip(logps[1:], statistics[1:], strict=True)),
        ]

    expected = results(2)
    for count in (1, 3, 4):
        for found, alone in zip(results(count), expected, strict=False):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))


@pytest.mark.parametrize("chunk_bytes", [None, TILED])
def test_statistics_change_no_bit_of_the_log_probs(chunk_bytes: int | None) -> None:
    """A run that logs the entropy trains as one that does not, on a vocabulary that is cut too."""
    case = make_case((200, 16, 20_011), torch.float32)
    options: dict[str, Any] = {"others_ND": [case.hidden_ND], "chunk_bytes": chunk_bytes}
    plain = token_logps(case.hidden_ND, case.weight_VD, case.targets_N, **options)
    head = Head(case.weight_VD, chunk_bytes=chunk_bytes)
    logps, _ = logps_and_statistics([case.hidden_ND] * 2, head, case.targets_N)
    assert all(torch.equal(a, b) for a, b in zip(plain, logps, strict=True))


@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_two_streams_may_carry_gradients(rows: int) -> None:
    """Their row gradients are bit for bit those of a call in which each is the first; a third stream has none."""
    cases = [make_case((127, 61, 1009), torch.float32, seed=seed) for seed in range(3)]
    hidden_states, head = [case.hidden_ND for case in cases], Head(cases[0].weight_VD, chunk_bytes=chunk_of(rows, 1009))
    output = logps_and_gradients(hidden_states, head, cases[0].targets_N, with_gradients=2)
    assert len(output.gradients) == 2
    for number in range(2):
        alone = logps_and_gradients([hidden_states[number]], head, cases[0].targets_N, with_gradients=1)
        assert torch.equal(output.logps[number], alone.logps[0])
        assert torch.equal(output.gradients[number], alone.gradients[0])


def test_the_reference_is_computed_from_its_own_rows() -> None:
    """Each stream's log-probs are what a call with that stream alone gives, to the rounding of a larger matmul."""
    case, other = (make_case((29, 17, 101), torch.float32, seed=seed) for seed in (0, 1))
    policy_N, reference_N = token_logps(
        case.hidden_ND, case.weight_VD, case.targets_N, others_ND=[other.hidden_ND], bias=case.bias_V
    )
    (alone_N,) = token_logps(other.hidden_ND, case.weight_VD, case.targets_N)
    rounding: dict[str, Any] = {"rtol": 0, "atol": 64 * EPSILON[torch.float32]}
    torch.testing.assert_close(reference_N, alone_N, **rounding)
    torch.testing.assert_close(policy_N, token_logps(case.hidden_ND, case.weight_VD, case.targets_N)[0], **rounding)
    assert not torch.allclose(policy_N, reference_N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_give_no_log_probs_and_a_zero_gradient(dtype: torch.dtype) -> None:
    """A rank with nothing to do still has a graph: N = 0 gives [0] values, and zeros reach what lies below."""
    case = make_case((4, 8, 31), dtype, with_bias=True)
    hidden_TD = case.hidden_ND.clone().requires_grad_()
    none_N = torch.zeros(0, dtype=torch.int64)
    logps_N, reference_logps_N = token_logps(
        hidden_TD[none_N], case.weight_VD, none_N, others_ND=[case.hidden_ND[none_N]], bias=case.bias_V
    )
    assert logps_N.shape == (0,)
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
    (logps_N,) = token_logps(hidden_ND, weight_VD, torch.tensor([0, 1, 2]))
    assert torch.equal(logps_N, torch.tensor([0.0, -big, -2 * big]))
    logps_N.sum().backward()
    assert hidden_ND.grad is not None
    assert torch.equal(hidden_ND.grad, (weight_VD - weight_VD[0]))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_equal_extreme_logits_share_the_probability(scale: float) -> None:
    """Four logits of 1e4 (or -1e4) are four probabilities of 1/4: -log 4, to float32 rounding at 1e4 (1e-3)."""
    (logps_N,) = token_logps(torch.ones(1, 1), torch.full((4, 1), scale), torch.tensor([2]))
    assert float(logps_N) == pytest.approx(-1.3862943611, abs=1e-3)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_backward_twice_gives_twice_the_gradient(trainable: bool) -> None:
    """With `retain_graph` a second backward adds the same gradient again: nothing saved is changed in place."""
    case = make_case((7, 13, 97), torch.float32, with_bias=True)
    inputs = [case.hidden_ND.requires_grad_()]
    if trainable:
        inputs.append(case.weight_VD.requires_grad_())
    (logps_N,) = token_logps(case.hidden_ND, case.weight_VD, case.targets_N, bias=case.bias_V)
    once = torch.autograd.grad(logps_N, inputs, case.upstream_N, retain_graph=True)
    logps_N.backward(case.upstream_N, retain_graph=True)
    logps_N.backward(case.upstream_N)
    for tensor, grad in zip(inputs, once, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, 2 * grad)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_second_derivative_is_refused(trainable: bool) -> None:
    """The row gradients are constants to autograd: a derivative of them would be wrong without a word."""
    case = make_case((7, 13, 97), torch.float32)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    weight_VD = case.weight_VD.requires_grad_(trainable)
    (logps_N,) = token_logps(hidden_ND, weight_VD, case.targets_N)
    (grad_ND,) = torch.autograd.grad(logps_N.square().sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_ND.sum().backward()


def test_inputs_are_left_as_they_were_and_a_frozen_head_gets_no_gradient() -> None:
    """The logits' memory is reused in place; hidden states, weight, bias and targets are not touched."""
    case = make_case((7, 13, 97), torch.float32, with_bias=True)
    before = make_case((7, 13, 97), torch.float32, with_bias=True)
    weight_VD = case.weight_VD
    hidden_ND = case.hidden_ND.requires_grad_()
    logps_N, _ = token_logps(hidden_ND, weight_VD, case.targets_N, bias=case.bias_V, others_ND=[hidden_ND])
    logps_N.sum().backward()
    assert weight_VD.grad is None
    for name in ("hidden_ND", "weight_VD", "targets_N", "bias_V"):
        assert torch.equal(getattr(case, name), getattr(before, name)), name


def test_attached_scales_rows_by_the_gradient_from_above() -> None:
    """By hand: rows (1, 2) and (3, 4), upstream 10 and -1: gradients (10, 20) and (-3, -4)."""
    hidden_ND = torch.zeros(2, 2, requires_grad=True)
    logps = (torch.tensor([-0.5, -0.25]), torch.tensor([-1.0, -2.0]))
    output = HeadOutput(logps, (torch.tensor([[1.0, 2.0], [3.0, 4.0]]),), ())
    logps_N, other_N = attached([hidden_ND, torch.ones(2, 2)], output)
    assert other_N is logps[1], "a stream without row gradients stays outside the graph"
    assert logps_N.tolist() == [-0.5, -0.25]
    logps_N.backward(torch.tensor([10.0, -1.0]))
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.tolist() == [[10.0, 20.0], [-3.0, -4.0]]


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
def test_confident_tokens_keep_their_digits(chunk_bytes: int) -> None:
    """1 - p of 1e-2 down to 1e-11: log-prob and gradient to 2e-5 of themselves, where p - 1 in float32 has no digit
    left below 6e-8."""
    case = make_case((12, 97, 97), torch.float32)
    case.weight_VD.mul_(0.05).add_(torch.eye(97))
    margins_N = torch.linspace(8, 30, 12)  # nats between the target and the rest
    case.hidden_ND.copy_(torch.eye(97)[case.targets_N] * margins_N[:, None])
    case.upstream_N.fill_(1)
    true_logps_N, true_grad_ND = naive(case, torch.float64)
    assert -1e-10 < float(true_logps_N.max()) < -1e-14
    logps_N, grad_ND = ours(case, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(logps_N.double(), true_logps_N, rtol=2e-5, atol=0)
    error_N = (grad_ND.double() - true_grad_ND).norm(dim=1) / true_grad_ND.norm(dim=1)
    assert float(error_N.max()) < 2e-5


def test_ignored_rows_are_not_computed() -> None:
    """Whatever stands in them, NaN too, passes into nothing: results 0, gradients 0, the others untouched."""
    case = make_case((40, 8, 31), torch.float32)
    asked_N = torch.arange(40) % 5 < 2
    hidden_ND = torch.where(asked_N[:, None], case.hidden_ND, torch.nan).requires_grad_()
    targets_N = torch.where(asked_N, case.targets_N, IGNORED)
    logps_N, reference_N = token_logps(hidden_ND, case.weight_VD, targets_N, others_ND=[hidden_ND.detach()])
    logps_N.sum().backward()
    (alone_N,) = token_logps(case.hidden_ND[asked_N], case.weight_VD, case.targets_N[asked_N])
    torch.testing.assert_close(logps_N[asked_N], alone_N, rtol=0, atol=2e-6)
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.isfinite().all()
    for values in (logps_N, reference_N, hidden_ND.grad):
        assert not values[~asked_N].any()


def test_not_a_number_is_not_hidden() -> None:
    """A NaN in a row makes that row's log-prob NaN, and no other's."""
    case = make_case((6, 8, 31), torch.float32)
    case.hidden_ND[3, 5] = torch.nan
    for chunk_bytes in (WHOLE, TILED):
        assert ours(case, chunk_bytes=chunk_bytes)[0].isnan().tolist() == [False] * 3 + [True] + [False] * 2


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_autocast_changes_nothing(trainable: bool) -> None:
    """Within autocast to bfloat16, forward and backward give the same bits: no operand is rounded."""
    results = []
    for enabled in (False, True):
        case = make_case((20, 16, 97), torch.float32)
        inputs = [case.hidden_ND.requires_grad_(), case.weight_VD.requires_grad_(trainable)][: 1 + trainable]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (logps_N,) = token_logps(case.hidden_ND, case.weight_VD, case.targets_N, chunk_bytes=TILED)
            results.append([logps_N, *torch.autograd.grad(logps_N, inputs, case.upstream_N)])
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(plain, under_autocast)


def test_an_impossible_target_has_no_part_in_the_entropy() -> None:
    """A bias of -inf, as for padding entries of a vocabulary: log-prob -inf, entropy that of the others."""
    bias_V = torch.tensor([0.0, 0.0, float("-inf")])
    for chunk_bytes in (WHOLE, TILED):
        head = Head(torch.zeros(3, 4), bias_V, chunk_bytes=chunk_bytes)
        (logps_N,), (statistics,) = logps_and_statistics([torch.zeros(2, 4)], head, torch.tensor([2, 0]))
        torch.testing.assert_close(logps_N, torch.tensor([float("-inf"), -0.6931472]))
        torch.testing.assert_close(statistics.entropy_N, torch.tensor([0.6931472, 0.6931472]))
