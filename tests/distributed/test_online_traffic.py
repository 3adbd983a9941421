"""What scoring by a stream and the hand-over gather, counted at DeepSpeed's backend: `benchmarks/online_traffic.py`."""

from typing import Any

import pytest
from online_traffic import bars, measure_all
from reference_traffic import write_model
from reward_models import saved_reward_adapter


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Of the benchmark's model on two ranks; the reward model is on all layers, as the policy is."""
    folder = write_model(tmp_path_factory.mktemp("traffic") / "model")
    adapter = saved_reward_adapter(folder, folder.parent / "reward", targets="all-linear")
    return measure_all(folder, adapter, 2)


def test_invariant_9_a_reward_stream_gathers_what_a_forward_of_sft_does(measured: tuple[Any, ...]) -> None:
    """Policy, reference and reward model in one visit: the bytes and collectives of the policy alone, and about a third
    of three visits' and of three models'; no prefetch trace is lost."""
    found, _, _ = measured
    policy, three = found["policy"], found["three streams"]
    assert three.gathered_bytes == policy.gathered_bytes > 0
    assert three.gathers == policy.gathers
    assert found["reward"].gathered_bytes <= policy.gathered_bytes
    assert three.invalidations == policy.invalidations == found["reward"].invalidations == 0
    for separate in ("three visits", "three models"):
        assert 0.3 < three.bytes_each / found[separate].bytes_each < 0.4


def test_scoring_between_steps_loses_no_trace_and_holds_no_base(measured: tuple[Any, ...]) -> None:
    """ZeRO keeps its prefetch trace, which a head that is a module of its own would make it drop; of weights a rank
    holds the reward model's adapter more, where a model of its own is a base more."""
    _, found, _ = measured
    plain, attached, own = (found[name] for name in ("not scored", "reward stream", "a model of its own"))
    assert attached.lost == plain.lost == 0
    assert attached.scoring.gathered_bytes > 0
    assert 0 < attached.held - plain.held < 0.02 * (own.held - plain.held)


def test_every_bar_of_online_traffic_holds(measured: tuple[Any, ...]) -> None:
    """With the hand-over of the policy."""
    found = bars(*measured)
    assert len(found) > 6
    assert [bar for bar in found if not bar.holds] == []
