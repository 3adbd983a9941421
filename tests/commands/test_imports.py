"""Commands that only read or print start at once: they import neither torch nor what imports it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import whole_checkpoint

from uft_ds.record.run_folder import RunFolder

_RUN = """
import json, sys
from uft_ds.cli import main
sys.argv = ["uft", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
print(json.dumps([code, [name for name in ("torch", "transformers", "peft", "deepspeed") if name in sys.modules]]))
"""

RUN, ROWS = "RUN", "ROWS"
"""Stand for the run's folder, and for a file of rows in it."""


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


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["recipe", "list"], 0),
        (["recipe", "show", "quickstart", "train.lr=1e-4"], 0),
        (["recipe", "keys", "train"], 0),
        (["score", "--help"], 0),
        (["eval", "--help"], 0),
        (["score", ROWS, "--by", "length", "--map", "quantile", "--out", f"{ROWS}.scored.jsonl"], 0),
        (["status", RUN], 1),
        (["checkpoint", "ls", RUN], 0),
        (["checkpoint", "verify", RUN], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_only_reads_imports_no_torch(command: list[str], exit_code: int, run: Path) -> None:
    """Of each such command, with the exit code that it has after all: `uft status` of a run that is not done has 1."""
    there = {RUN: str(run), ROWS: str(run / "rows.jsonl")}
    words = json.dumps([re.sub("|".join(there), lambda match: there[match[0]], word) for word in command])
    ended = subprocess.run([sys.executable, "-c", _RUN, words], capture_output=True, text=True, check=False, timeout=60)
    assert json.loads(ended.stdout.splitlines()[-1]) == [exit_code, []], ended.stdout + ended.stderr
