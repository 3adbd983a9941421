"""The gate on served log-probs: rounding passes, another policy does not, and what bfloat16 cannot see is stated."""

from __future__ import annotations

import math

import pytest
import torch

from uft_ds.errors import CheckFailed
from uft_ds.rollouts.gate import Gap, check_served

F32, BF16 = torch.float32, torch.bfloat16


def case(responses: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Own log-probs of responses of equal length, and the lengths."""
    own_R = -torch.rand(responses, generator=torch.Generator().manual_seed(0)) * tokens
    return own_R, torch.full((responses,), tokens)


def noise(responses: int, tokens: int, std: float) -> torch.Tensor:
    """Sums of independent errors of tokens."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(responses, generator=draw) * std * math.sqrt(tokens)


@pytest.mark.parametrize(("dtype", "std"), [(F32, 2.2e-6 * 1.25), (BF16, 1.7e-2 * 1.25)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("responses", "tokens"), [(1, 1), (1, 6), (16, 6), (64, 200), (512, 50)])
def test_measured_rounding_passes(dtype: torch.dtype, std: float, responses: int, tokens: int) -> None:
    """Errors of the measured size in both types, for steps of all sizes."""
    own_R, tokens_R = case(responses, tokens)
    error_R = noise(responses, tokens, std)
    gap = check_served(own_R.double(), own_R.double() + error_R, tokens_R, dtype=dtype)
    assert math.isclose(gap.mean, float(error_R.double().sum()) / (responses * tokens), rel_tol=1e-5, abs_tol=1e-12)
    assert math.isclose(gap.worst, float(error_R.abs().max()), rel_tol=1e-5, abs_tol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_measured_errors_pass(sign: int) -> None:
    """3.7e-5 of a response in float32, 0.3 of one in bfloat16, on either side, among many without an error."""
    for dtype, error in ((F32, 3.7e-5), (BF16, 0.3)):
        own_R, tokens_R = case(64, 6)
        served_R = own_R.double()
        served_R[5] += sign * error
        gap = check_served(own_R, served_R, tokens_R, dtype=dtype)
        assert math.isclose(gap.worst, error, rel_tol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("a_token", [0.006, 0.016, 0.2])
def test_wrong_weights_are_seen_in_float32(a_token: float, sign: int) -> None:
    """The smallest gap of a wrong adapter that was measured, that of a stale prefix, and the largest; one response."""
    own_R, tokens_R = case(1, 6)
    with pytest.raises(CheckFailed, match="explains at most"):
        check_served(own_R, own_R + sign * a_token * tokens_R, tokens_R, dtype=F32)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_stale_prefix_is_seen_in_bfloat16_by_the_mean(sign: int) -> None:
    """0.016 a token over 64 answers of 50 tokens passes each response's bound, and not that of the mean."""
    own_R, tokens_R = case(64, 50)
    served_R = own_R + sign * 0.016 * tokens_R + noise(64, 50, 0.02)
    with pytest.raises(CheckFailed, match="in the mean of 3200 tokens"):
        check_served(own_R, served_R, tokens_R, dtype=BF16)


def test_what_bfloat16_cannot_see() -> None:
    """The documented limit: 0.006 a token hides in bfloat16, however long the step is."""
    own_R, tokens_R = case(512, 50)
    gap = check_served(own_R, own_R + 0.006 * tokens_R, tokens_R, dtype=BF16)
    assert math.isclose(gap.mean, 0.006, rel_tol=1e-4)


def test_the_refusal_names_the_worst_response() -> None:
    """Its number, both log-probs, its length, the bound, and the usual causes. Worst is for its length."""
    own_R, served_R = torch.tensor([-100.0, -5.0, -7.0]), torch.tensor([-100.002, -5.001, -7.0])
    with pytest.raises(CheckFailed) as raised:
        check_served(own_R, served_R, torch.tensor([100, 1, 4]), dtype=F32)
    message = str(raised.value)
    # 0.002 / sqrt(100) = 0.0002 and 0.001 / sqrt(1) = 0.001
    for words in ("response 1 of 3", "-5.001", "-5 own", "over 1 tokens", "0.001 apart", "0.0001", "prefixes", "dtype"):
        assert words in message


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["own", "served"])
def test_what_is_not_finite_is_refused(wrong: float, side: str) -> None:
    """A NaN compares false with every bound, and must not pass by that."""
    own_R, tokens_R = case(4, 6)
    served_R = own_R.clone()
    (own_R if side == "own" else served_R)[2] = wrong
    with pytest.raises(CheckFailed, match="response 2 of 4"):
        check_served(own_R, served_R, tokens_R, dtype=BF16)


def test_no_response_has_no_gap() -> None:
    """A step in which every question was left out."""
    empty_R = torch.zeros(0)
    assert check_served(empty_R, empty_R, empty_R, dtype=F32) == Gap(0.0, 0.0)
