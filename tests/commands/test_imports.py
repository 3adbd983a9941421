"""Commands that only read or print start at once: they import neither torch nor what imports it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import whole_checkpoint
from imported import Ended, ended

from uft_ds.record.run_folder import RunFolder

RUN, ROWS = "RUN", "ROWS"
"""Stand for the run's folder, and for a file of rows in it."""

EXIT_CODES = {
    ("--help",): 0,
    ("train", "--help"): 0,
    ("recipe", "list"): 0,
    ("recipe", "show", "quickstart", "train.lr=1e-4"): 0,
    ("recipe", "keys", "train"): 0,
    ("score", "--help"): 0,
    ("eval", "--help"): 0,
    ("score", ROWS, "--by", "length", "--map", "quantile", "--out", f"{ROWS}.scored.jsonl"): 0,
    ("status", RUN): 1,
    ("checkpoint", "ls", RUN): 0,
    ("checkpoint", "verify", RUN): 0,
}
"""By each command that only reads."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one whole checkpoint, and the line of its first step."""
    folder = tmp_path_factory.mktemp("run")
    whole_checkpoint(folder / "checkpoints" / "step-000003")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "recipe.yaml").write_text("recipe_format: 1\n")
    RunFolder(folder).lock.touch()
    (folder / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    return folder


@pytest.fixture(scope="module")
def results(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Ended]:
    there = {RUN: str(run), ROWS: str(run / "rows.jsonl")}
    words = [
        [re.sub("|".join(there), lambda match: there[match[0]], word) for word in command] for command in EXIT_CODES
    ]
    names = ("torch", "transformers", "peft", "deepspeed")
    return dict(zip(EXIT_CODES, ended(words, names, tmp_path_factory.mktemp("ended")), strict=True))


@pytest.mark.parametrize("command", EXIT_CODES, ids=" ".join)
def test_a_command_that_only_reads_imports_no_torch(
    results: dict[tuple[str, ...], Ended], command: tuple[str, ...]
) -> None:
    """Of each such command, with the exit code that it has after all: `uft status` of a run that is not done has 1."""
    found = results[command]
    assert (found.code, found.imported) == (EXIT_CODES[command], []), found.out + found.err


def test_an_import_would_be_seen(tmp_path: Path) -> None:
    """Of a module that these commands do import."""
    (found,) = ended([["recipe", "list"]], ("yaml", "torch"), tmp_path)
    assert found.imported == ["yaml"]
