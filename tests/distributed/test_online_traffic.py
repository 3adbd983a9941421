"""What scoring by a stream and the hand-over gather, counted at DeepSpeed's backend: `benchmarks/online_traffic.py`."""

from pathlib import Path
from typing import Any

import pytest
from online_traffic import bars, measure_all, measure_visits
from ranks import run_on_ranks
from reference_traffic import write_model
from reward_models import saved_reward_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The benchmark's model, and a reward model on all layers, as the policy is."""
    folder = write_model(tmp_path_factory.mktemp("traffic") / "model")
    return folder, saved_reward_adapter(folder, folder.parent / "reward", targets="all-linear")


@pytest.fixture(scope="module")
def measured(models: tuple[Path, Path]) -> tuple[Any, ...]:
    """All that the benchmark measures, on two ranks."""
    return measure_all(*models, 2)


@pytest.mark.long
def test_invariant_9_a_reward_stream_gathers_what_a_forward_of_sft_does(models: tuple[Path, Path]) -> None:
    """Policy, reference and reward model in one visit: the bytes and collectives of the policy alone, and about a third
    of three visits'; no prefetch trace is lost."""
    found = run_on_ranks(measure_visits, 2, *models)[0]
    policy, three = found["policy"], found["three streams"]
    assert three.gathered_bytes == policy.gathered_bytes > 0
    assert three.gathers == policy.gathers
    assert found["reward"].gathered_bytes <= policy.gathered_bytes
    assert three.invalidations == policy.invalidations == found["reward"].invalidations == 0
    assert 0.3 < three.bytes_each / found["three visits"].bytes_each < 0.4


@pytest.mark.long
def test_three_streams_gather_a_third_of_three_models(measured: tuple[Any, ...]) -> None:
    """Each with a base and an engine of its own."""
    found, _, _ = measured
    assert 0.3 < found["three streams"].bytes_each / found["three models"].bytes_each < 0.4


@pytest.mark.long
def test_scoring_between_steps_loses_no_trace_and_holds_no_base(measured: tuple[Any, ...]) -> None:
    """ZeRO keeps its prefetch trace, which a head that is a module of its own would make it drop; of weights a rank
    holds the reward model's adapter more, where a model of its own is a base more."""
    _, found, _ = measured
    plain, attached, own = (found[name] for name in ("not scored", "reward stream", "a model of its own"))
    assert attached.lost == plain.lost == 0
    assert attached.scoring.gathered_bytes > 0
    assert 0 < attached.held - plain.held < 0.02 * (own.held - plain.held)


@pytest.mark.long
def test_every_bar_of_online_traffic_holds(measured: tuple[Any, ...]) -> None:
    """With the hand-over of the policy."""
    found = bars(*measured)
    assert len(found) > 6
    assert [bar for bar in found if not bar.holds] == []
