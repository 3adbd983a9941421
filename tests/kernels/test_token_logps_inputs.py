"""What the log-prob kernels refuse, by name, and what they cannot look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_case, ours
from torch import Tensor

from uft_ds.kernels.chunks import Head, chunks_of, sweep_vocabulary
from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.token_logps import IGNORED, token_logps


@pytest.mark.parametrize("target", [31, -1, -99])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    """Only `IGNORED` means something."""
    case = make_case((6, 8, 31), torch.float32)
    case.targets_N[2] = target
    with pytest.raises(IndexError, match=rf"targets\[2\] is {target}, expected 0 to 30 \(1 of 6 "):
        ours(case)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    """A row more of hidden states than targets would be dropped without a word."""
    case = make_case((6, 8, 31), torch.float32)
    hidden_ND, weight_VD, targets_N = case.hidden_ND, case.weight_VD, case.targets_N
    with pytest.raises(ValueError, match=r"^hidden: shape \[6, 8\], expected \[5, 8\] to go with 5 targets"):
        token_logps(hidden_ND, weight_VD, targets_N[:5])
    with pytest.raises(ValueError, match=r"^others\[0\]: shape \[5, 8\], expected \[6, 8\]"):
        token_logps(hidden_ND, weight_VD, targets_N, others_ND=[hidden_ND[:5]])
    with pytest.raises(ValueError, match=r"^bias: shape \[30\], expected \[31\]"):
        token_logps(hidden_ND, weight_VD, targets_N, bias=torch.zeros(30))
    with pytest.raises(ValueError, match=r"^hidden: shape \[6, 7\], expected \[6, 8\]"):
        token_logps(hidden_ND[:, :7], weight_VD, targets_N)
    with pytest.raises(ValueError, match=r"^hidden: shape \[6, 8\], expected \[5, 8\] to go with 5 targets"):
        token_logps(hidden_ND, weight_VD, torch.tensor([IGNORED, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"^targets: torch.int64 of shape \[1, 6\] on cpu, expected torch.int64"):
        token_logps(hidden_ND, weight_VD, targets_N[None])


def test_types_that_do_not_belong_together_are_refused() -> None:
    """A reference in float32 beside a policy in bfloat16 would be rounded without a word."""
    case = make_case((6, 8, 31), torch.bfloat16)
    hidden_ND, weight_VD, targets_N = case.hidden_ND, case.weight_VD, case.targets_N
    with pytest.raises(ValueError, match=r"^others\[0\]: torch.float32 on cpu, expected torch.bfloat16 on cpu"):
        token_logps(hidden_ND, weight_VD, targets_N, others_ND=[hidden_ND.float()])
    with pytest.raises(ValueError, match=r"^hidden: torch.float32 on cpu, expected torch.bfloat16 on cpu"):
        token_logps(hidden_ND.float(), weight_VD, targets_N)
    with pytest.raises(ValueError, match=r"^bias: torch.int64 on cpu, expected torch.bfloat16 on cpu"):
        token_logps(hidden_ND, weight_VD, targets_N, bias=torch.zeros(31, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float32], ids=str)
def test_targets_are_token_ids(dtype: torch.dtype) -> None:
    """torch takes uint8 for a mask, and gives other log-probs without a word."""
    case = make_case((6, 8, 31), torch.float32)
    with pytest.raises(ValueError, match=rf"^targets: {dtype} of shape \[6\] on cpu, expected torch.int64"):
        token_logps(case.hidden_ND, case.weight_VD, case.targets_N.to(dtype))


@pytest.mark.parametrize("weight", [torch.zeros(8), torch.zeros(0, 8), torch.zeros(31, 8, dtype=torch.int64)])
def test_a_weight_that_is_none_is_refused(weight: Tensor) -> None:
    """One dimension, no vocabulary, whole numbers."""
    with pytest.raises(ValueError, match=r"^weight: torch\.\w+ of shape .* expected numbers of \[vocabulary, hidden"):
        token_logps(torch.zeros(2, 8), weight, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("chunk_bytes", [0, -1, 1.5, True, "8"])
def test_chunk_bytes_that_make_no_sense_are_refused(chunk_bytes: Any) -> None:
    """Named, with what was expected."""
    case = make_case((6, 8, 31), torch.float32)
    with pytest.raises(ValueError, match=r"^chunk_bytes: .*, expected a positive whole number of bytes, or None"):
        ours(case, chunk_bytes=chunk_bytes)


def test_a_target_that_no_tile_holds_gives_nan_where_targets_are_not_looked_at() -> None:
    """On a GPU a target outside the vocabulary is found by its NaN, in value and gradient; here, below the check."""
    case = make_case((3, 8, 31), torch.float32)
    targets_N = torch.tensor([5, 31, -7])
    (chunk,) = chunks_of([case.hidden_ND], targets_N, 16)
    values, gradients_CD = sweep_vocabulary(chunk, Head(case.weight_VD), 16, with_gradients=1, with_entropy=False)
    assert gradients_CD is not None
    assert values.logps_R[:3].isnan().tolist() == [False, True, True]
    assert gradients_CD.isnan().all(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0, expected a positive number"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"softcap": -30.0}, "softcap: -30.0, expected a positive number, or None"),
        ({"scale": 0.0}, "scale: 0.0, expected a finite number other than 0"),
        ({"scale": float("inf")}, "scale: inf"),
        ({"softcap": "30"}, "softcap: '30', expected a positive number"),
        ({"temperature": None}, "temperature: None, expected a positive number"),
        ({"softcap": True}, "softcap: True, expected a positive number"),
    ],
)
def test_factors_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    """Named by their argument."""
    with pytest.raises(ValueError, match=message):
        LogitTransform(**options)
