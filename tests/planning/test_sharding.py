"""A DeepSpeed file, as DeepSpeed reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.planning.gathers import Bounds
from uft_ds.planning.sharding import Sharding, sharding_of


def sharding(tmp_path: Path, **zero: Any) -> Sharding:
    """Of a file with this section, by the way a plan takes."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}))
    return sharding_of(read_deepspeed_file(str(path)))


def test_what_is_left_out_or_auto_has_deepspeeds_default(tmp_path: Path) -> None:
    """As its documentation lists them; `overlap_comm` goes with stage 3."""
    left_out = sharding(tmp_path)
    assert left_out.bounds == Bounds(50_000_000, 1_000_000_000, 1_000_000_000, 100_000)
    assert left_out.reduce_bucket == 500_000_000
    auto = {"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto", "stage3_max_live_parameters": "auto"}
    assert sharding(tmp_path, **auto) == left_out
    assert left_out.overlaps
    assert sharding(tmp_path, overlap_comm=None).overlaps
    assert not sharding(tmp_path, stage=2, overlap_comm=None).overlaps


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        ({"cpu_offload_param": True}, {"offload_param": {"device": "cpu"}}),
        ({"prefetch_bucket_size": 7}, {"stage3_prefetch_bucket_size": 7}),
        ({"param_persistence_threshold": 7}, {"stage3_param_persistence_threshold": 7}),
    ],
)
def test_other_names_that_deepspeed_takes_mean_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], old: dict[str, Any], new: dict[str, Any]
) -> None:
    """Its older keys, and its own names of fields; nothing is printed, for stdout may be JSON."""
    assert sharding(tmp_path, **old) == sharding(tmp_path, **new) != sharding(tmp_path)
    assert capfd.readouterr().out == ""
