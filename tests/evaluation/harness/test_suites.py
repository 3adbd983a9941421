"""Which tasks a suite asks, with which shots, and what the paper's columns are made of."""

from __future__ import annotations

import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.suites import SUITES, AskedTask, paper_columns, suite_of


def test_suites_have_the_papers_shots() -> None:
    """Of both leaderboards, six tasks each."""
    shots = {asked.task: asked.shots for name in ("leaderboard", "openllm") for asked in SUITES[name].asked}
    assert shots == {
        "leaderboard_bbh": 3, "leaderboard_gpqa": 0, "leaderboard_mmlu_pro": 5, "leaderboard_musr": 0,
        "leaderboard_ifeval": 0, "leaderboard_math_hard": 4, "gsm8k": 5, "truthfulqa_mc2": 0, "winogrande": 5,
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5,
    }  # fmt: skip
    assert SUITES["quick"].limit == 100


def test_a_list_of_tasks_is_a_suite() -> None:
    """Shots: as given, else the paper's, else the task's own."""
    found = suite_of("arc_challenge, arc_easy=3,sciq")
    assert found.asked == (AskedTask("arc_challenge", 25), AskedTask("arc_easy", 3), AskedTask("sciq"))
    assert found.name == "arc_challenge+arc_easy+sciq"
    assert suite_of("/my/own.yaml=2").name == "own"  # a folder of results has the suite's name


@pytest.mark.parametrize("given", ["", "gsm8k,", "gsm8k=x", "gsm8k=", "=3", "gsm8k,gsm8k=0"])
def test_a_list_that_is_none_is_refused(given: str) -> None:
    """With what was found."""
    with pytest.raises(UserError, match="--suite: "):
        suite_of(given)


def test_a_column_is_the_mean_of_its_metrics() -> None:
    """IFEval (0.1 + 0.2 + 0.3 + 0.6) / 4 = 0.3, GSM8K (0.2 + 0.4) / 2 = 0.3; a metric that is missing gives none."""
    ifeval = dict(zip(("prompt_level_strict_acc,none", "inst_level_strict_acc,none", "prompt_level_loose_acc,none",
                       "inst_level_loose_acc,none"), (0.1, 0.2, 0.3, 0.6), strict=True))  # fmt: skip
    gsm8k = {"exact_match,strict-match": 0.2, "exact_match,flexible-extract": 0.4}
    found = paper_columns({"leaderboard_ifeval": (ifeval, 0), "gsm8k": (gsm8k, 5), "arc_challenge": ({"acc": 1.0}, 25)})
    assert found == pytest.approx({"ifeval": 0.3, "gsm8k": 0.3})


@pytest.mark.parametrize("of_group", [None, 0])
def test_other_shots_are_no_column_of_the_paper(of_group: int | None) -> None:
    """ARC with 25 examples is one, with 5 it is none; nor is a group of other shots, or of shots that differ."""
    metrics = {"acc_norm,none": 0.5}
    measured = {"arc_challenge": (metrics, 25), "leaderboard_bbh": (metrics, 3)}
    assert paper_columns(measured) == {"arc": 0.5, "bbh": 0.5}
    assert paper_columns({"arc_challenge": (metrics, 5), "leaderboard_bbh": (metrics, of_group)}) == {}


def test_an_average_is_that_of_a_whole_board() -> None:
    """Of six columns (0.1 + ... + 0.6) / 6 = 0.35, as `uft compare` has it; of five there is none."""
    tasks = (("gsm8k", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("arc_challenge", 25), ("hellaswag", 10))
    names = ("exact_match,strict-match", "exact_match,flexible-extract", "acc,none", "acc_norm,none")
    measured = {task: (dict.fromkeys(names, 0.1 * place), shots) for place, (task, shots) in enumerate(tasks, 1)}
    assert not any(name.startswith("average") for name in paper_columns(measured))
    found = paper_columns(measured | {"mmlu": ({"acc,none": 0.6}, 5)})
    assert found["average, old leaderboard"] == pytest.approx(0.35)
