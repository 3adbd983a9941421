"""What a report says of its run."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.to_settings import settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.facts import facts_of

ENDED = datetime(2026, 11, 30, 8, 3, tzinfo=timezone(timedelta(hours=2)))


def facts(path: Path, **keys: object) -> dict[str, str]:
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    tree = {"name": "x", "model": {"base": "some/base"}, "data": data, "output": str(path), **keys}
    settings = settings_of(recipe_from_tree(tree, "x"))
    return facts_of(settings, RunFolder(path), trained=4_884_480, ranks=2, ended=ENDED)


def test_a_run_is_told_in_a_few_lines(tmp_path: Path) -> None:
    """Steps, responses and seconds are sums over the steps alone; dates have their time zone."""
    began = {"date": "2026-11-30T07:35:10+02:00", "resumes": [{"step": 9}, {"step": 12}]}
    (tmp_path / "environment.json").write_text(json.dumps(began))
    lines = [
        {"step": 0, "held_out/loss": 0.25, "held_out/responses/score": 100.0},
        {"step": 1, "grad_norm": 1.0, "seconds": 3600.0, "responses/score": 12.0, "responses/pair": 8.0},
        {"step": 2, "grad_norm": None, "seconds": 65.0, "responses/score": 1200.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss = {"score": "mse", "pair": {"dpo": 1.0, "nll": 0.2}}
    told = facts(tmp_path, objective={"loss": loss, "beta": {"pair": 0.1}}, lora={"targets": ["q_proj", "v_proj"]})
    assert told == {
        "base": "some/base",
        "began": "2026-11-30 07:35 UTC+02:00; resumed at step 9, 12",
        "ended": "2026-11-30 08:03 UTC+02:00",
        "time of the steps": "1 h 1 min, without start and evaluations",
        "steps": "2 with 1,220 responses",
        "trained": "LoRA of rank 16 (alpha 16) on q_proj, v_proj: 4,884,480 parameters",
        "objective": "loss {score: mse, pair: {dpo: 1, nll: 0.2}}, beta {pair: 0.1}, learning rate 3e-05",
        "ran on": "2 ranks, bfloat16, DeepSpeed file zero3",
    }


@pytest.mark.parametrize("text", [None, "", "null", "{}", '{"date": 3}', '{"date": "2026-11-30", "resumes": [1]}'])
def test_a_record_that_cannot_be_read_costs_only_its_date(tmp_path: Path, text: str | None) -> None:
    """Runs that older versions began have no date either."""
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    told = facts(tmp_path)
    assert told["began"] == "not known"
    assert told["steps"] == "0 with 0 responses"
