"""One merged file of all kinds, as in UFT's own picture: trained, evaluated and resumed by the kind of each row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from runs import settings_of_run, uft, write_recipe, write_rows

from uft_ds.data.example import KINDS
from uft_ds.errors import UserError
from uft_ds.recipe.settings import Settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import open_data
from uft_ds.run.resume import prepare_resume
from uft_ds.training.steps import steps_of

pytestmark = pytest.mark.long
"""Steps of mixed kinds and their losses are held by `test_mixed_steps.py` without a run."""

LOSSES = {"instruction": "mse", "score": "bce", "binary": "l1", "pair": {"dpo": 1.0, "nll": 0.2}}


def merged(prefix: str, count: int) -> list[dict[str, Any]]:
    """The kinds in turn, of uneven length; scores from 1 to 5."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt, answer = f"{prefix} {i}", "yes " * (1 + i % 4)
        row = (
            {"response": answer},
            {"response": answer, "score": 1 + i % 5},
            {"response": answer, "label": i % 8 == 2},
            {"chosen": answer, "rejected": "no"},
        )[i % 4]
        rows.append({"prompt": prompt, **row})
    return rows


@pytest.fixture(scope="module")
def trained(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run that has ended. The file is one array on one line, as `json.dump` writes it."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "merged.json").write_text(json.dumps(merged("Say", 48)), encoding="utf-8")
    mixed = {"format": "jsonl", "mixed_kinds": True, "score_range": [1, 5]}
    more = [{"prompt": f"More {i}", "response": "yes"} for i in range(40)]
    sources = [
        {**mixed, "path": str(folder / "merged.json"), "share": 0.6},
        {"format": "jsonl", "path": str(write_rows(folder / "more.jsonl", more))},
    ]
    held_out = [{**mixed, "path": str(write_rows(folder / "held.jsonl", merged("Held", 20)))}]
    recipe = write_recipe(
        folder,
        tiny_qwen2,
        data__sources=sources,
        data__held_out=held_out,
        objective__loss=LOSSES,
        train__examples_per_step=16,
        train__tokens_per_micro_batch=128,
    )
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "note: " + str(folder / "merged.json") + ": scores from 1 to 5 found; score_range maps 1 to 0" in result.stdout
    )
    return recipe


def data_of(recipe: Path) -> tuple[Settings, Any]:
    settings = settings_of_run(recipe)
    return settings, open_data(settings, RunFolder(settings.output))


def test_every_kind_is_trained_by_its_own_loss(trained: Path) -> None:
    """Each step's metrics count the kinds that the step holds, and its loss is their losses' sum over its terms."""
    steps = [line for line in read_metrics(trained.parent / "run" / "metrics.jsonl") if "grad_norm" in line]
    planned = steps_of(*data_of(trained))
    for number, line in enumerate(steps):
        held = [response.kind for response in planned[number].responses]
        assert {kind: line.get(f"responses/{kind}", 0) for kind in KINDS} == {kind: held.count(kind) for kind in KINDS}
    counted = {kind: sum(line.get(f"responses/{kind}", 0) for line in steps) for kind in KINDS}
    assert all(counted.values()), counted
    first = steps[0]
    # At step 0 every log-ratio is 0: sigmoid(0) = 1/2, whatever the kind.
    assert first["loss/instruction"] == pytest.approx(0.25, abs=1e-6)
    assert first["loss/pair/dpo"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["loss/score"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["loss/binary"] == pytest.approx(0.5, abs=1e-6)


def test_shares_count_the_responses_of_all_kinds(trained: Path) -> None:
    """60 of the responses are of the merged file: 1.5 times its rows' 60 responses beside 40 others."""
    report = json.loads((trained.parent / "run" / "data" / "report.json").read_text())
    mixed, more = report["train"]
    assert mixed["responses_of_kind"] == {"instruction": 12, "score": 12, "binary": 12, "pair": 24}
    assert (mixed["responses"], mixed["responses_per_epoch"]) == (60, pytest.approx(60))
    assert more["responses_per_epoch"] == pytest.approx(40)
    assert (mixed["score_range"], mixed["scores_found"]) == ([1.0, 5.0], [1.0, 5.0])
    planned = steps_of(*data_of(trained))
    held = [response for step in planned for response in step.responses]
    of_mixed = [response for response in held if "merged.json[" in response.origin]
    assert len(of_mixed) / len(held) == pytest.approx(0.6, abs=0.05)
    # The score is the row's, mapped: row i of kind `score` has 1 + i % 5 of 1 to 5.
    for response in of_mixed:
        index = int(response.origin.split("[")[1].split("]")[0])
        if response.kind == "score":
            assert response.score == index % 5 / 4


def test_held_out_rows_are_told_by_kind(trained: Path) -> None:
    """A metric of each kind, and the table of rows with the kind of each."""
    (last,) = [
        line
        for line in read_metrics(trained.parent / "run" / "metrics.jsonl")
        if line.get("step") == 4 and "held_out/loss" in line
    ]
    assert all(f"held_out/loss/{kind}" in last for kind in KINDS)
    with (trained.parent / "run" / "held_out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} == {
        "instruction": 5,
        "score": 5,
        "binary": 5,
        "pair": 10,
    }


@pytest.mark.parametrize("change", ["data.sources.0.score_range=[0, 5]", "data.held_out.0.score_range=[1, 10]"])
def test_another_scale_is_another_run(trained: Path, change: str) -> None:
    """Its targets would be others: a resume is refused, with the key."""
    key = change.partition("=")[0]
    (trained.parent / "run" / "DONE").unlink(missing_ok=True)
    with pytest.raises(UserError, match=rf"{key}\.\d: "):
        prepare_resume(settings_of_run(trained, change), say=print)
