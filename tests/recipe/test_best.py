"""Which of two values of a metric is the better one."""

from __future__ import annotations

import numpy as np
import pytest
from toy import UFT

from uft_ds.recipe.best import BEST, badness, best_problem
from uft_ds.record.telemetry import ROW, health


@pytest.mark.parametrize(
    ("metric", "best_first"),
    [
        ("held_out/loss", [-1.0, 0.5, 2.0]),
        ("held_out/loss/pair", [0.5, 2.0]),
        ("held_out/loss/pair/dpo", [0.5, 2.0]),
        ("held_out/score_error/score", [0.1, 0.2]),
        ("held_out/calibration_error/score", [0.1, 0.2]),
        ("held_out/pair_accuracy/pair", [0.9, 0.5]),
        ("held_out/pair_margin/pair", [3.0, -1.0]),
        ("held_out/rank_correlation/binary", [0.9, -1.0]),
        ("held_out/logp_chosen/pair", [-10.0, -20.0]),
        ("held_out/implicit_reward_chosen/pair", [2.0, -1.0]),
        ("held_out/length_correlation/instruction", [0.0, -0.1, 0.2, -0.9]),
    ],
)
def test_the_best_value_by_its_metric(metric: str, best_first: list[float]) -> None:
    """Losses and errors go down, likelihoods and orders up; a correlation with length goes to 0."""
    assert best_problem(metric) is None
    worst_first = best_first[::-1]
    assert sorted(worst_first, key=lambda value: badness(metric, value)) == best_first


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("loss", "is not a held-out metric, such as held_out/loss"),
        ("held_out", "is not a held-out metric"),
        *(
            (f"held_out/{name}/score", "which has no best value")
            for name in ("responses", "implicit_score", "saturated")
        ),
        ("held_out/log_ratio/pair", "which has no best value"),
        ("held_out/implicit_reward_rejected/pair", "which has no best value"),
        ("held_out/los", "which has no best value"),
        ("held_out/", "which has no best value"),
        ("held_out/pair_accuracy/score", "which is never measured"),
        ("held_out/rank_correlation", "which is never measured"),
        ("held_out/rank_correlation/pairs", "which is never measured"),
        ("held_out/rank_correlation/pair/dpo", "which is never measured"),
        ("held_out/loss/pair/orpo", "which is never measured"),
    ],
)
def test_what_has_no_best_value_is_refused(metric: str, problem: str) -> None:
    """What was found, and what can be used: also where a mean is neither good nor bad, or a name is not whole."""
    found = best_problem(metric)
    assert found is not None
    assert found.startswith(f"{metric!r} ")
    assert problem in found
    if not problem.startswith("is no"):
        assert "take held_out/loss, held_out/loss/KIND, or held_out/NAME/KIND; NAME: score_error, " in found


def test_every_metric_with_a_best_value_is_measured() -> None:
    """The names are those of the telemetry."""
    rows = np.zeros(4, dtype=ROW)
    rows["kind"], rows["pair"], rows["tokens"] = 3, [0, 0, 1, 1], 2
    assert BEST.keys() - {"loss"} <= {name.split("/")[0] for name in health(rows, UFT)}
