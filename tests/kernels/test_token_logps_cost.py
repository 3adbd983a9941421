"""What the log-prob kernels cost, by torch's own count: matmuls, and the largest tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, TILED, WHOLE, logps_and_statistics, make_case, ours
from suites import long_but
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.token_logps import IGNORED, token_logps


@pytest.mark.parametrize("chunk_bytes", [WHOLE, TILED])
@pytest.mark.parametrize(
    ("others", "trainable", "asked", "matmuls"),
    [(0, False, 80, 2), (1, False, 80, 3), (0, True, 80, 4), (0, False, 32, 2), (1, False, 32, 3), (3, False, 32, 5)],
)
def test_the_number_of_matmuls(others: int, trainable: bool, asked: int, matmuls: int, chunk_bytes: int) -> None:
    """Forward and backward, in units of asked rows x D x V, by torch's own count: nothing is computed twice."""
    case = make_case((80, 24, 512), torch.float32)
    targets_N = torch.where(torch.arange(80) % 5 < asked // 16, case.targets_N, IGNORED)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    with FlopCounterMode(display=False) as flops:
        logps_N, *_ = token_logps(
            hidden_ND,
            case.weight_VD.requires_grad_(trainable),
            targets_N,
            others_ND=[case.hidden_ND] * others,
            chunk_bytes=chunk_bytes,
        )
        logps_N.sum().backward()
    assert flops.get_total_flops() == matmuls * 2 * asked * 24 * 512


class LargestTensor(TorchDispatchMode):
    """The largest memory that any operator takes for its result, in bytes; views of `known` tensors take none."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("chunk_bytes", long_but([2**15], [2**15, 2**17]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", long_but([{"softcap": 5.0}], [{}, {"softcap": 5.0}]), ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("streams", long_but([3], [2, 3]))
def test_no_tensor_is_larger_than_it_may_be(
    streams: int, trainable: bool, options: dict[str, float], dtype: torch.dtype, chunk_bytes: int
) -> None:
    """All logits of a stream would be 512 KB: nothing larger than `chunk_bytes` or the results comes into being."""
    case = make_case((64, 24, 2048), dtype)
    hidden_ND, weight_VD = case.hidden_ND.requires_grad_(), case.weight_VD.requires_grad_(trainable)
    with LargestTensor(hidden_ND, weight_VD) as largest:
        head = Head(weight_VD, None, LogitTransform(**options), chunk_bytes)
        logps, _ = logps_and_statistics([hidden_ND, *[hidden_ND.detach()] * (streams - 1)], head, case.targets_N)
        logps[0].sum().backward()
    own = weight_VD.numel() * weight_VD.element_size() if trainable else streams * 64 * 24 * 4
    assert largest.size <= max(chunk_bytes, own)


def test_without_a_gradient_to_compute_none_is() -> None:
    """Under no_grad, or where nothing requires one: one matmul, and the same values."""
    case = make_case((48, 24, 512), torch.float32)
    expected_N = ours(case)[0]
    with FlopCounterMode(display=False) as flops:
        assert torch.equal(token_logps(case.hidden_ND, case.weight_VD, case.targets_N)[0], expected_N)
    assert flops.get_total_flops() == 2 * 48 * 24 * 512
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        hidden_ND, weight_VD = case.hidden_ND.clone().requires_grad_(), case.weight_VD.clone().requires_grad_()
        assert torch.equal(token_logps(hidden_ND, weight_VD, case.targets_N)[0], expected_N)
    assert flops.get_total_flops() == 2 * 48 * 24 * 512


def test_only_padding_is_computed_beyond_the_asked_rows() -> None:
    """33 rows of 80 are asked for: the matmuls see 48, the next multiple of 16."""
    case = make_case((80, 24, 512), torch.float32)
    targets_N = torch.where(torch.arange(80) < 33, case.targets_N, IGNORED)
    with FlopCounterMode(display=False) as flops:
        token_logps(case.hidden_ND, case.weight_VD, targets_N)
    assert flops.get_total_flops() == 2 * 48 * 24 * 512
