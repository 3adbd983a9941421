"""The files that a comparison is written to."""

from __future__ import annotations

from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.evaluation.comparison.compare import Comparison
from uft_ds.evaluation.comparison.picture import write_picture
from uft_ds.evaluation.comparison.tables import as_json, latex, markdown
from uft_ds.host.files import write_atomically

NAME = "comparison"
_ENDINGS = ("md", "tex", "json", "png")


def check_free(folder: Path) -> None:
    """Refuse to write over a comparison.

    Raises:
        UserError: names the file that is there, or says that the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; expected a folder, which is made if it is missing")
    for path in _paths(folder):
        if path.exists():
            raise UserError(f"{path}: exists; give another folder or delete it")


def write_comparison(found: Comparison, folder: Path) -> list[Path]:
    """Write Markdown, LaTeX, JSON and PNG.

    Returns:
        the paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = _paths(folder)
    for path, text in zip(paths, (markdown(found), latex(found), as_json(found)), strict=False):
        write_atomically(path, text)
    write_picture(found, paths[-1])
    return paths


def _paths(folder: Path) -> list[Path]:
    return [folder / f"{NAME}.{ending}" for ending in _ENDINGS]
