"""A slip in a recipe is told before anything that takes seconds is imported."""

from __future__ import annotations

import pytest
from imported import Ended, ended

COMMANDS = (
    ("train", "quickstart"),
    ("train", "quickstart", "--dry-run"),
    ("train", "quickstart", "--resume"),
    ("plan", "quickstart"),
    ("data", "preview", "quickstart"),
    ("reference", "quickstart"),
    ("quickstart",),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Ended]:
    words = [[*command, "train.learnig_rate=1e-4"] for command in COMMANDS]
    found = ended(words, ("torch", "transformers", "datasets"), tmp_path_factory.mktemp("ended"))
    return dict(zip(COMMANDS, found, strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_slip_is_told_before_anything_is_imported(
    results: dict[tuple[str, ...], Ended], command: tuple[str, ...]
) -> None:
    """By every command that takes a recipe: exit code 2, the key that is meant, and no torch."""
    found = results[command]
    assert (found.code, found.imported) == (2, []), found.out + found.err
    assert "train.learnig_rate: unknown key; did you mean 'learning_rate'? Here it is train.lr" in found.err
