"""What lockstep gathers and keeps, counted at DeepSpeed's backend: the bars of `benchmarks/reference_traffic.py`."""

from pathlib import Path

import pytest
from ranks import run_on_ranks
from reference_traffic import Measurement, bars, measure, measure_all, write_model

ONE_STEP, SEQUENCES = 1, 6
"""Fewer than the benchmark measures, because nothing that is counted here depends on them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's model."""
    return write_model(tmp_path_factory.mktemp("traffic"))


def measure_each(folder: Path, names: tuple[str, ...]) -> list[Measurement]:
    """Two cases in one start."""
    return [measure(folder, name, True, ONE_STEP, SEQUENCES) for name in names]


@pytest.mark.long
def test_lockstep_gathers_and_keeps_what_sft_does(folder: Path) -> None:
    """With a reference: the same bytes and collectives, the same saved activations, no lost prefetch trace."""
    lockstep, sft = run_on_ranks(measure_each, 2, folder, ("lockstep", "SFT"))[0]
    assert lockstep.gathered_bytes == sft.gathered_bytes > 0
    assert lockstep.gathers == sft.gathers <= 12  # 4 layers forward and backward, embedding, norm, head
    assert lockstep.invalidations == sft.invalidations == 0
    assert lockstep.saved_bytes == sft.saved_bytes > 0
    assert lockstep.largest_initial_ratio == 0.0


def test_invariant_9_gathered_bytes_and_saved_activations_of_three_streams_are_those_of_sft(folder: Path) -> None:
    """Policy, bare base and a frozen adapter in one visit: the bytes of SFT with the same adapters, no lost trace."""
    three, sft = run_on_ranks(measure_each, 2, folder, ("three streams", "SFT, same adapters"))[0]
    assert three.gathered_bytes == sft.gathered_bytes > 0
    assert three.gathers == sft.gathers <= 12
    assert three.invalidations == 0
    assert three.saved_bytes == sft.saved_bytes > 0


@pytest.mark.long
def test_two_trained_streams_gather_what_one_does(folder: Path) -> None:
    """Policy and value in one visit: but for the value's head of 256 weights, the bytes of SFT with two adapters."""
    both, sft = run_on_ranks(measure_each, 2, folder, ("policy and value", "SFT, same adapters"))[0]
    assert sft.gathered_bytes <= both.gathered_bytes <= 1.01 * sft.gathered_bytes
    assert both.invalidations == 0


@pytest.mark.long
def test_every_bar_holds(folder: Path) -> None:
    """Against two forwards in one root, two calls as TRL makes them, a cached reference and SFT, on two ranks.

    Without gradient checkpointing; the tests above have it. The benchmark measures both.
    """
    measured = bars(measure_all(folder, 2, gradient_checkpointing=False, sequences_per_rank=SEQUENCES))
    assert len(measured) > 8
    assert [bar for bar in measured if not bar.holds] == []
