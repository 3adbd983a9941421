"""A slip in a recipe is told before anything that takes seconds is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_RUN = """
import json, sys
from uft_ds.cli import main
sys.argv = ["uft", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, [name for name in ("torch", "transformers", "datasets") if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["train", "quickstart"],
        ["train", "quickstart", "--dry-run"],
        ["train", "quickstart", "--resume"],
        ["plan", "quickstart"],
        ["data", "preview", "quickstart"],
        ["reference", "quickstart"],
        ["quickstart"],
    ],
    ids=" ".join,
)
def test_a_slip_is_told_before_anything_is_imported(command: list[str]) -> None:
    """By every command that takes a recipe: exit code 2, the key that is meant, and no torch."""
    words = json.dumps([*command, "train.learnig_rate=1e-4"])
    ended = subprocess.run([sys.executable, "-c", _RUN, words], capture_output=True, text=True, check=False, timeout=60)
    assert json.loads(ended.stdout.splitlines()[-1]) == [2, []], ended.stdout + ended.stderr
    assert "train.learnig_rate: unknown key; did you mean 'learning_rate'? Here it is train.lr" in ended.stderr
