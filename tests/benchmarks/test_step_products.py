"""What a step's matrix products take: they are all found, and a product that is slower counts more."""

from __future__ import annotations

import time
from math import prod

import pytest
import torch
from step_products import products_of, seconds_of, share_in_step
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8, bias=False))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_all_products_of_a_step_are_noted(layers: nn.Module, again: bool) -> None:
    """As many operations as torch counts, forward and backward, with what is computed again."""
    inputs = torch.randn(2, 5, 8, requires_grad=True)

    def step() -> None:
        outputs = checkpoint(layers, inputs, use_reentrant=False) if again else layers(inputs)
        torch.bmm(outputs, outputs.mT).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    noted = 0
    for (_, shapes), times in products_of(step).items():
        (rows, other) = (sizes for sizes, _, _ in shapes[-2:])
        noted += times * 2 * prod(rows) * other[-1]
    assert noted == counter.get_total_flops()


def test_a_larger_product_takes_longer() -> None:
    small, large = (
        seconds_of(products_of(lambda width=width: torch.randn(width, width) @ torch.randn(width, width)))  # type: ignore[misc]
        for width in (64, 512)
    )
    assert 0 < small < large


def test_what_is_no_product_is_not_of_their_share() -> None:
    matrix = torch.randn(512, 512)
    assert share_in_step(lambda: matrix @ matrix) > 0.5 > share_in_step(lambda: (matrix @ matrix, time.sleep(0.2)))
    assert share_in_step(matrix.exp) == 0
