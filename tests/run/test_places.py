"""No run may empty a folder in which something lies that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.to_settings import settings_of
from uft_ds.run.checks import check_inputs_lie_outside
from uft_ds.run.settings import located


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with rows in it, rows beside it, and links to both."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/data", "x", "rows", "linked"):
        Path(name).mkdir(parents=True)
    for name in ("run/data/mine.jsonl", "rows/more.jsonl"):
        Path(name).write_text("{}")
    Path("alias").symlink_to("run")
    Path("mine.jsonl").symlink_to("run/data/mine.jsonl")
    Path("linked/mine.jsonl").symlink_to("../run/data/mine.jsonl")
    Path("to_rows").symlink_to("rows")
    return tmp_path


def check(path: str, output: str, **model: str) -> None:
    data = {"sources": [{"format": "jsonl", "path": path}]}
    tree = {"name": "x", "model": {"base": "base", **model}, "data": data, "output": output}
    check_inputs_lie_outside(located(settings_of(recipe_from_tree(tree, "x"))))


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("run/data/mine.jsonl", "run"),
        ("run/data", "run"),
        ("alias/data/mine.jsonl", "run"),
        ("mine.jsonl", "run"),
        ("run/data/mine.jsonl", "alias"),
        ("run/data/mine.jsonl", "x/../run"),
        ("x/../run/data/mine.jsonl", "run"),
        ("linked", "run"),
    ],
)
def test_rows_in_the_output_are_refused_by_whatever_name(here: Path, path: str, output: str) -> None:
    """Through a link, by a path with `..`, or as a link in a folder: `--overwrite` would delete them."""
    with pytest.raises(UserError, match=r"output: data\.sources\.0\.path .* lies inside .*give another folder"):
        check(path, output)


@pytest.mark.parametrize("output", ["rows/run", "to_rows/run", "rows"])
def test_an_output_in_a_folder_of_data_is_refused(here: Path, output: str) -> None:
    """The folder is read with everything below it, so a second start would read the first one's files."""
    with pytest.raises(UserError, match=r"data\.sources\.0\.path .*rows"):
        check("rows", output)


def test_other_inputs_are_compared_by_place_too(here: Path) -> None:
    """A base that a link names."""
    with pytest.raises(UserError, match=r"output: model\.base .*alias/data lies inside"):
        check("rows", "run", base="alias/data")


def test_what_lies_elsewhere_is_taken(here: Path) -> None:
    """Beside the output, through a link too, and a name that only begins alike."""
    Path("run-data.jsonl").write_text("{}")
    for path in ("rows/more.jsonl", "to_rows", "run-data.jsonl"):
        check(path, "run")


def test_an_output_of_an_unknown_user_is_refused(here: Path) -> None:
    """Otherwise a folder of that name would be made here."""
    with pytest.raises(UserError, match=r"output: .* there is no user 'nosuchuser'"):
        check("rows", "~nosuchuser/run")
