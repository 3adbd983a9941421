"""Runs of the quickstart's model for a study: trained once, asked once, and remembered in a file of results.

A study takes hours. Each of its runs is therefore a line of a file below `results/`, with the revision that it was
measured with: what has a line is not run again, so that several evenings, or several machines, make one table.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Student's t for a two-sided interval of 95%, by the number of seeds."""


class Results:
    """The lines of one study's file. A run is known by what makes it another run: method, seed, steps and the like."""

    def __init__(self, name: str) -> None:
        self._path = RESULTS / f"{name}.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        rows = map(json.loads, lines)
        self._found: dict[str, dict[str, Any]] = {_name(row["run"]): row["found"] for row in rows}

    def of(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured of a run; None if it was not."""
        return self._found.get(_name(run))

    def add(self, run: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Keep what was measured of a run, in memory and in the file."""
        from uft_ds.run.identity import git_revision

        self._found[_name(run)] = found
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": run, "revision": git_revision(), "found": found}) + "\n")


def _name(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def uft(*arguments: str) -> str:
    """The output of a command of `uft` that ends well; the study ends with one that does not."""
    command = [sys.executable, "-m", "uft_ds", *arguments]
    ended = subprocess.run(command, text=True, capture_output=True, check=False, env={**os.environ, "COLUMNS": "1000"})
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
    return ended.stdout


def train(recipe: str, run: Path, overrides: Mapping[str, Any], *options: str) -> None:
    """A run to its end, unless it is done; goes on with one that was interrupted."""
    if (run / "DONE").exists():
        return
    given = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    resumes = ("--resume",) if (run / "recipe.yaml").exists() else ()
    uft("train", recipe, *given, f"output={run}", *options, *resumes)


def policy_of(run: Path | None, base: Path) -> tuple[Any, Any]:
    """A run's newest adapter on the base, not merged, or the base alone (None); and the tokenizer."""
    from peft import PeftModel

    from uft_ds.evaluation.generate import load_for_generation

    model, tokenizer = load_for_generation(base)
    return model if run is None else PeftModel.from_pretrained(model, str(run / "latest" / "adapter")), tokenizer


def answers_of(model: Any, tokenizer: Any, tasks: Sequence[Any], max_new_tokens: int) -> list[str]:
    """A model's answer to each task, token by token the likeliest."""
    from uft_ds.evaluation.generate import generate_responses

    prompts = [[{"role": "user", "content": task.prompt}] for task in tasks]
    return generate_responses(model, tokenizer, prompts, max_new_tokens=max_new_tokens)


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of a 95% interval over seeds; one value alone has none."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    t = T_95.get(len(values), 2.0)
    return f"{mean:.3f} +- {t * statistics.stdev(values) / math.sqrt(len(values)):.3f}"
