"""Models side by side: columns, averages, pairs, the tax, and models that may not be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from uft_ds.cli import app
from uft_ds.errors import UserError
from uft_ds.evaluation.comparison.compare import Comparison, compare
from uft_ds.evaluation.comparison.contestants import contestants_of
from uft_ds.evaluation.comparison.files import write_comparison
from uft_ds.evaluation.comparison.tables import latex, main_table, markdown, tax_table
from uft_ds.evaluation.harness.suites import paper_columns
from uft_ds.evaluation.results import Evaluation, ItemResult, TaskResult, write_evaluation

SETTINGS = {"lm_eval": "0.4.13", "chat_template": False}


def evaluated(
    folder: Path,
    name: str,
    right: Mapping[str, Sequence[int]],
    *,
    settings: Mapping[str, Any] = SETTINGS,
    more: Sequence[TaskResult] = (),
) -> Path:
    """An evaluation of tasks whose items are right (1) or wrong (0)."""
    tasks = [TaskResult(task, {"acc": sum(of) / len(of)}, len(of), "1", 5) for task, of in right.items()]
    items = {task: [ItemResult(str(i), {"acc": float(v)}) for i, v in enumerate(of)] for task, of in right.items()}
    write_evaluation(folder, Evaluation(name, {}, settings, [*tasks, *more]), items)
    return folder


def compared(*folders: Path | str, **options: Any) -> Comparison:
    return compare(contestants_of([str(folder) for folder in folders]), **{"against": None} | options)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """MMLU: 30 of 40 right, of which 20 the other model has, too; winogrande: the same."""
    base = evaluated(tmp_path / "base", "base", {"mmlu": [1] * 20 + [0] * 20, "winogrande": [1, 0] * 10})
    ours = evaluated(tmp_path / "uft", "uft", {"mmlu": [1] * 30 + [0] * 10, "winogrande": [1, 0] * 10})
    return base, ours


def test_differences_are_taken_over_the_same_items(two: tuple[Path, Path]) -> None:
    """25 points with an interval around them and a small p; and none at all where the answers are the same."""
    found = compared(*two)
    assert found.against == "base"
    mmlu, winogrande = (found.differences["uft"][name] for name in ("mmlu", "winogrande"))
    assert mmlu is not None
    assert mmlu.mean == 0.25
    assert 0.1 < mmlu.low < 0.25 < mmlu.high < 0.45
    assert mmlu.p < 0.01
    assert winogrande is not None
    assert (winogrande.mean, winogrande.low, winogrande.high) == (0.0, 0.0, 0.0)
    assert [row[1] for row in main_table(found)] == ["winogrande", "50.00", "50.00"]
    assert [row[2] for row in main_table(found)] == ["mmlu", "50.00", "75.00*"]


def test_pairs_are_found_by_item_not_by_place(tmp_path: Path) -> None:
    """The second file lists its items backwards."""
    task = [TaskResult("winogrande", {"acc": 0.5}, 4, "1", 5)]
    items = [ItemResult(str(number), {"acc": float(number < 2)}) for number in range(4)]
    for name, of_one in (("a", items), ("b", items[::-1])):
        write_evaluation(tmp_path / name, Evaluation(name, {}, {}, task), {"winogrande": of_one})
    difference = compared(tmp_path / "a", tmp_path / "b").differences["b"]["winogrande"]
    assert difference is not None
    assert (difference.low, difference.high) == (0.0, 0.0)


def test_other_items_make_no_pairs(two: tuple[Path, Path], tmp_path: Path) -> None:
    """The values stay, the interval goes, and the notes say why."""
    other = tmp_path / "other"
    items = {"mmlu": [ItemResult(f"x{number}", {"acc": 1.0}) for number in range(40)]}
    write_evaluation(other, Evaluation("other", {}, SETTINGS, [TaskResult("mmlu", {"acc": 1.0}, 40, "1", 5)]), items)
    found = compared(two[0], other)
    assert found.values["other"]["mmlu"] == 1.0
    assert found.differences["other"]["mmlu"] is None
    assert "did not answer the same items" in markdown(found)


def test_a_number_that_is_no_mean_over_items_has_no_interval(tmp_path: Path) -> None:
    """As an accuracy by instruction: 0.7, where the items' mean is 0.5."""
    for name in ("a", "b"):
        result = TaskResult("winogrande", {"acc": 0.7}, 2, "1", 5)
        items = [ItemResult("0", {"acc": 1.0}), ItemResult("1", {"acc": 0.0})]
        write_evaluation(tmp_path / name, Evaluation(name, {}, {}, [result]), {"winogrande": items})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.values["a"]["winogrande"] == 0.7
    assert found.differences["b"]["winogrande"] is None


def test_a_groups_pairs_are_its_tasks_items(tmp_path: Path) -> None:
    """The group has a number and no items; its tasks have both, under the same ids, and are no columns of their own."""
    for name, of in (("a", [0, 0, 0, 0]), ("b", [1, 0, 0, 1])):
        group = TaskResult("mmlu", {"acc,none": sum(of) / 4}, 4, "1", 5, parts=("mmlu_law", "mmlu_art"))
        evaluated(tmp_path / name, name, {"mmlu_law": of[:2], "mmlu_art": of[2:]}, more=[group])
    found = compared(tmp_path / "a", tmp_path / "b")
    assert [column.name for column in found.columns] == ["mmlu"]
    difference = found.differences["b"]["mmlu"]
    assert difference is not None
    assert (difference.mean, difference.items) == (0.5, 4)


def test_groups_within_a_group_are_no_columns(tmp_path: Path) -> None:
    """MMLU has four of them; each would count for the tax and for Holm once more. A group of other tasks is one."""
    for name, right in (("base", [1, 1, 1, 1]), ("uft", [1, 0, 1, 0])):
        share = sum(right) / 4
        tasks = ("mmlu_law", "mmlu_art")
        groups = [
            TaskResult("mmlu", {"acc,none": share}, 4, "1", 5, parts=tasks),
            TaskResult("mmlu_stem", {"acc,none": share}, 2, "1", 5, parts=tasks[:1]),
            TaskResult("own", {"acc,none": share}, 2, "1", 5, parts=("own_part",)),
        ]
        evaluated(tmp_path / name, name, {"mmlu_law": right[:2], "mmlu_art": right[2:], "winogrande": [1]}, more=groups)
    found = compared(tmp_path / "base", tmp_path / "uft", origins=["base"])
    assert {column.name for column in found.columns} == {"mmlu", "winogrande", "own"}
    tax = found.taxes["uft"]["base"]
    assert (tax.columns, tax.lost) == (3, pytest.approx(1 / 3))


def test_tasks_of_like_names_are_columns_of_their_own(tmp_path: Path) -> None:
    """`mmlu_pro` is no part of `mmlu`, and a task `bbh` is not the paper's bbh, which is leaderboard_bbh."""
    for name in ("a", "b"):
        bbh = TaskResult("leaderboard_bbh", {"acc_norm": 0.75}, 4, "1", 3)
        evaluated(tmp_path / name, name, {"mmlu": [1, 0], "mmlu_pro": [1, 1], "bbh": [0, 0]}, more=[bbh])
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.values["a"] == {"bbh": 0.75, "mmlu": 0.5, "mmlu_pro": 1.0, "task bbh": 0.0}


def test_evaluations_of_two_models_are_not_one_row(tmp_path: Path) -> None:
    """Of a run's checkpoints, both under the run's name: told by the adapter's hash, of judged answers too."""

    def written(name: str, task: str, model: dict[str, Any]) -> None:
        result = TaskResult(task, {"acc": 0.5}, 4, "1", 5)
        write_evaluation(tmp_path / "run" / name, Evaluation("run", model, {}, [result]), {})

    weights = {"base_weights": ["a" * 64], "adapter": "1" * 64}
    written("asked", "mmlu", weights)
    written("judged", "mt_bench", {"answers_sha256": "5" * 64, "model": {**weights, "device": "cpu"}})
    written("unknown", "alpaca_eval", {"answers_sha256": "6" * 64})
    evaluated(tmp_path / "b", "b", {"mmlu": [1, 0]}, settings={})
    allowed = compared(tmp_path / "run", tmp_path / "b", allow_unlike=True)
    assert allowed.names == ("run", "b")
    written("later", "winogrande", weights | {"adapter": "2" * 64})
    with pytest.raises(UserError, match="evaluations of two models, by the hashes of their weights; give them names"):
        compared(tmp_path / "run", tmp_path / "b")


def test_an_average_needs_all_six(tmp_path: Path) -> None:
    """And is the plain mean of the columns, gsm8k's itself the mean of two metrics, as in the paper."""
    five = {"truthfulqa_mc2": [1, 0], "winogrande": [1, 1], "mmlu": [0, 0]}
    more = [
        TaskResult("gsm8k", {"exact_match,strict-match": 0.2, "exact_match,flexible-extract": 0.6}, 2, "3", 5),
        TaskResult("arc_challenge", {"acc_norm,none": 0.5, "acc,none": 0.1}, 2, "1", 25),
        TaskResult("hellaswag", {"acc_norm,none": 0.9}, 2, "1", 10),
    ]
    evaluated(tmp_path / "all", "all", five, more=more)
    evaluated(tmp_path / "some", "some", five, more=more[1:])
    found = compared(tmp_path / "all", tmp_path / "some")
    assert found.averages["all"]["old leaderboard"] == pytest.approx((0.4 + 0.5 + 1 + 0.5 + 0.9 + 0) / 6)
    assert found.averages["some"] == {}
    assert main_table(found)[0][-1] == "average, old leaderboard"
    assert [row[-1] for row in main_table(found)[1:]] == ["55.00", "-"]


def test_a_column_has_the_number_that_an_evaluation_shows(tmp_path: Path) -> None:
    """IFEval the mean of four metrics, math-hard the paper's metric; both tasks of IFEval have columns of their own."""
    ifeval = dict(zip(("prompt_level_strict_acc,none", "inst_level_strict_acc,none", "prompt_level_loose_acc,none",
                       "inst_level_loose_acc,none"), (0.2, 0.4, 0.3, 0.5), strict=True))  # fmt: skip
    math = {"exact_match,none": 0.5, "exact_match_original,none": 0.3}
    tasks = [TaskResult("ifeval", ifeval, 10, "1", 0), TaskResult("leaderboard_math_hard", math, 10, "1", 4)]
    other = TaskResult("leaderboard_ifeval", {name: value / 2 for name, value in ifeval.items()}, 10, "1", 0)
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, Evaluation(name, {}, {}, tasks), {})
    shown = paper_columns({task.task: (task.metrics, task.shots) for task in tasks})
    assert compared(tmp_path / "a", tmp_path / "b").values["a"] == shown == {"ifeval": 0.35, "math-hard": 0.3}
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, Evaluation(name, {}, {}, [*tasks, other]), {})
    found = compared(tmp_path / "a", tmp_path / "b").values["a"]
    assert found == pytest.approx({"ifeval": 0.175, "task ifeval": 0.35, "math-hard": 0.3})


def test_the_tax_counts_losses_alone(tmp_path: Path) -> None:
    """Against the base: 50 points lost on one task and 50 gained on the other are a tax of 25 and a change of 0."""
    evaluated(tmp_path / "base", "base", {"mmlu": [1, 1], "winogrande": [0, 0]})
    evaluated(tmp_path / "uft", "uft", {"mmlu": [1, 0], "winogrande": [1, 0]})
    found = compared(tmp_path / "base", tmp_path / "uft", origins=["base"])
    tax = found.taxes["uft"]["base"]
    assert (tax.lost, tax.changed, tax.columns) == (0.25, 0.0, 2)
    assert found.taxes["base"] == {}
    # Of [-1, 0] and of [1, 0] a coin makes 50 points of loss or of gain: 25 are lost on average.
    assert (tax.lost_by_chance, tax.paired) == (0.25, 2)
    assert [row[:2] for row in tax_table(found)[-4:]] == [
        ["tasks that both have", "2"],
        ["alignment tax (mean loss)", "25.00"],
        ["mean loss by chance alone", "25.00"],
        ["mean change", "+0.00"],
    ]


def test_a_tax_says_what_chance_makes_of_it(tmp_path: Path) -> None:
    """Of six answers that differ a coin loses the mean of max(0, wrong - right) of 40."""
    ours = [1, 0, 1, 1, 0, 1, *[1] * 34]
    for name, right in (("base", [1 - one for one in ours[:6]] + ours[6:]), ("uft", ours)):
        alone = TaskResult("hellaswag", {"acc_norm,none": 0.5}, 10, "1", 10)
        evaluated(tmp_path / name, name, {"mmlu": right}, more=[alone])
    found = compared(tmp_path / "base", tmp_path / "uft", origins=["base"])
    tax = found.taxes["uft"]["base"]
    expected = sum(max(0, 6 - 2 * right) * math.comb(6, right) for right in range(7)) / 2**6 / 40
    assert tax.lost_by_chance == pytest.approx(expected, rel=0.03)
    assert (tax.columns, tax.paired, tax.lost) == (2, 1, 0.0)
    assert tax_table(found)[-2][1].endswith(" (1 of 2 tasks)")
    assert "by chance alone is what it would be" in markdown(found)


def test_where_a_server_is_does_not_matter(tmp_path: Path) -> None:
    """Nor which suite a task was part of; what the task asks does, and whether a server answered."""

    def written(name: str, content: str = "a", **settings: Any) -> Path:
        of_tasks = {"arc_challenge": {"rows": "test", "content": content}, name: {"content": name}}
        all_settings = SETTINGS | {"suite": name, "tasks": of_tasks, "data": {f"{name}.jsonl": "x"}} | settings
        result = TaskResult("arc_challenge", {"acc_norm,none": 0.5}, 10, "1", 25)
        write_evaluation(tmp_path / name, Evaluation(name, {}, all_settings, [result]), {})
        return tmp_path / name

    base = written("base", server=["http://127.0.0.1:8000/v1", "base"])
    alike = written("uft", server=["http://127.0.0.1:8001/v1", "uft"])
    assert compared(base, alike).unlike == ()
    with pytest.raises(UserError, match=r"settings\.server: True for base, False for here"):
        compared(base, written("here", server=None))
    with pytest.raises(UserError, match=r"settings\.tasks\.content: 'a' for base, 'b' for other"):
        compared(base, written("other", "b", server=["http://127.0.0.1:8001/v1", "other"]))


def test_other_questions_in_a_part_of_a_group_are_seen(tmp_path: Path) -> None:
    """A group's condition is that of all its tasks."""
    for name, last in (("a", "1"), ("b", "1"), ("c", "2")):
        tasks = {"mmlu_law": {"content": "0"}, "mmlu_art": {"content": last}}
        group = TaskResult("mmlu", {"acc,none": 0.5}, 4, "1", 5, parts=("mmlu_law", "mmlu_art"))
        write_evaluation(tmp_path / name, Evaluation(name, {}, {"tasks": tasks}, [group]), {})
    assert compared(tmp_path / "a", tmp_path / "b").unlike == ()
    with pytest.raises(UserError, match=r"mmlu: settings\.tasks\.content: "):
        compared(tmp_path / "a", tmp_path / "c")


def test_prompts_that_were_cut_are_told(tmp_path: Path) -> None:
    """By task, with those of a group's tasks, where one model had any."""
    for name, cut in (("a", {}), ("b", {"mmlu_law": 2, "mmlu_art": 1, "unasked": 5})):
        parts = ("mmlu_law", "mmlu_art")
        tasks = [TaskResult("mmlu", {"acc,none": 0.5}, 4, "1", 5, parts=parts), TaskResult("own", {"acc": 1}, 2, "1")]
        write_evaluation(tmp_path / name, Evaluation(name, {"cut_prompts": cut}, {}, tasks), {})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert len(found.cut) == 1
    assert "mmlu: questions whose prompts did not fit into the positions and were cut: 0 for a, 3 for b." in markdown(
        found
    )


def test_models_of_one_name_are_one_model(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Its benchmarks and its judgement lie in two folders; the judge's name stands at the number."""
    for name, grade in (("base", 5.0), ("uft", 6.5)):
        result = TaskResult("mt_bench", {"grade": grade}, 80, "1", judge="gpt-x")
        write_evaluation(tmp_path / f"judged_{name}", Evaluation(name, {}, {}, [result]), {})
    found = compared(*two, tmp_path / "judged_base", tmp_path / "judged_uft")
    assert found.names == ("base", "uft")
    assert main_table(found)[0][-1] == "MT-Bench (judge: gpt-x)"
    assert [row[-1] for row in main_table(found)[1:]] == ["5.00", "6.50"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": SETTINGS | {"chat_template": True}}, r"settings.chat_template: False for base, True for other"),
        ({"settings": {"lm_eval": "0.4.13"}}, "settings.chat_template: False for base, not given for other"),
        ({"right": {"mmlu": [1, 0]}}, "mmlu: items: 40 for base, 2 for other"),
    ],
)
def test_models_that_were_evaluated_otherwise_are_refused(
    two: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """Unless the user wants it: then the tables say how they differ."""
    given = {"right": {"mmlu": [1] * 40}, "settings": SETTINGS} | change
    other = evaluated(tmp_path / "other", "other", given["right"], settings=given["settings"])
    with pytest.raises(UserError, match=words):
        compared(two[0], other)
    assert words.replace("\\", "") in markdown(compared(two[0], other, allow_unlike=True))


def test_another_judge_is_refused(tmp_path: Path) -> None:
    """Grades by two judges never stand beside each other unnoticed."""
    for name, judge in (("a", "gpt-x"), ("b", "llama-y")):
        result = TaskResult("mt_bench", {"grade": 5.0}, 80, "1", judge=judge)
        write_evaluation(tmp_path / name, Evaluation(name, {}, {}, [result]), {})
    with pytest.raises(UserError, match="mt_bench: judge: 'gpt-x' for a, 'llama-y' for b"):
        compared(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["base"], "at least two models, found those of base"),
        (["uft=", "base"], r"found '.*uft=', expected FOLDER or NAME=FOLDER; is a variable of the shell"),
        (["base", "base"], "mmlu is in .* and in .*NAME=FOLDER"),
        (["base", "nothing"], r"nothing: no evaluation in it: expected results\.json"),
    ],
)
def test_folders_that_make_no_comparison(two: tuple[Path, Path], given: list[str], words: str) -> None:
    """One model, one model twice, and a folder without an evaluation."""
    with pytest.raises(UserError, match=words):
        compared(*(two[0].parent / name for name in given))


def test_unknown_names_are_told(two: tuple[Path, Path]) -> None:
    """With the names that there are."""
    with pytest.raises(UserError, match="no model is called 'sft'; expected one of base, uft"):
        compared(*two, origins=["sft"])


def test_no_task_in_common_is_told(tmp_path: Path) -> None:
    """With the tasks of each."""
    folders = [evaluated(tmp_path / name, name, {task: [1, 0]}) for name, task in (("a", "mmlu"), ("b", "winogrande"))]
    with pytest.raises(UserError, match="no task is in the evaluations of two models: a has mmlu; b has winogrande"):
        compared(*folders)


def test_a_user_compares_three_runs(two: tuple[Path, Path], tmp_path: Path) -> None:
    """A run's folder, one evaluation under a name of the user's, and a plain folder; four files are written."""
    run = tmp_path / "run" / "evaluations" / "openllm"
    evaluated(run, "policy", {"mmlu": [1] * 40, "winogrande": [1] * 20})
    words = ["compare", str(two[0]), f"mine={two[1]}", str(tmp_path / "run"), "--origin", "base"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "mine - base" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"comparison.{ending}" for ending in ("json", "md", "png", "tex")
    ]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["values"]["policy"]["mmlu"] == 1.0
    assert found["taxes"]["mine"]["base"]["lost"] == 0.0
    again = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, UserError)
    assert "comparison.md: exists" in str(again.exception)


def test_no_name_breaks_a_table(tmp_path: Path) -> None:
    """Signs that Markdown or LaTeX would read are written so that they are seen."""
    for name in ("a|b_c%", "d&e"):
        evaluated(tmp_path / name.replace("|", ""), name, {"my_task": [1, 0]})
    found = compared(*tmp_path.iterdir())
    assert r"a\|b_c%" in markdown(found)
    assert r"a|b\_c\%" in latex(found)
    assert r"d\&e" in latex(found)
    assert r"my\_task" in latex(found)


def test_an_interval_without_an_end_is_null(tmp_path: Path) -> None:
    """One item: JSON has no infinity."""
    folders = [evaluated(tmp_path / name, name, {"mmlu": [right]}) for name, right in (("a", 0), ("b", 1))]
    write_comparison(compared(*folders), tmp_path / "out")
    difference = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"]["b"]["mmlu"]
    assert (difference["low"], difference["high"], difference["mean"]) == (None, None, 1.0)


def test_an_origin_is_compared_with_earlier_origins_alone(tmp_path: Path) -> None:
    """The SFT model was trained from the base, and the base from nothing here. A folder's name may hold `=`."""
    folders = [evaluated(tmp_path / f"lr=1e-5-{name}", name, {"mmlu": [1, 0]}) for name in ("base", "sft", "uft")]
    found = compared(folders[0], f"start={folders[1]}", folders[2], origins=["base", "start"])
    assert {name: list(taxes) for name, taxes in found.taxes.items()} == {
        "base": [], "start": ["base"], "uft": ["base", "start"]
    }  # fmt: skip
