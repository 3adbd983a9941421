"""The files of a folder: all of them, or an error."""

import os
from pathlib import Path

import datasets
import pytest
from reading_rows import contents, refusal
from sources import write_rows

from uft_ds.data.rows.reading import find_data
from uft_ds.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data" / "a.jsonl", [{"a": 1}])
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["b.jsonl", "part2", "b.parquet"])
def test_a_dead_link_in_a_folder_is_refused(folder: Path, name: str) -> None:
    """A moved disk does not take half of the rows away; hidden ones and other files are not data."""
    (folder / name).symlink_to("gone.jsonl")
    assert refusal(folder).startswith(f"{folder / name}: a link to gone.jsonl, which is not there")
    (folder / name).unlink()
    (folder / ".#a.jsonl").symlink_to("gone")
    (folder / "README.md").symlink_to("gone")
    assert len(contents(folder)) == 1


@pytest.mark.parametrize("place", [b"\xff.jsonl", b"\xe9t\xe9/a.jsonl"], ids=["file", "folder"])
def test_a_name_that_is_not_utf8_is_refused(folder: Path, place: bytes) -> None:
    """Places of rows are written into files of the run: it would fail at its first evaluation."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), place)))  # noqa: PTH118 - of bytes
    write_rows(path, [{"a": 2}])
    shown = place.decode("ascii", "backslashreplace")
    assert refusal(folder) == f"{folder}: the name of the file {shown} in it is not UTF-8; rename it"


def test_links_to_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    """In the order of the names; one that leads back is refused."""
    write_rows(tmp_path / "other" / "b.jsonl", [{"a": 2}])
    (folder / "part2").symlink_to(tmp_path / "other")
    assert [place for place, _ in contents(folder)] == [f"{folder}/a.jsonl:1", f"{folder}/part2/b.jsonl:1"]
    (folder / "z").symlink_to(folder)
    assert "a link to a folder that holds it" in refusal(folder)


def test_an_unreadable_folder_is_not_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows below it would be missing."""
    (folder / "sub").mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> object:
        if path.name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert refusal(folder).startswith(f"{folder / 'sub'}: cannot be read (Permission denied)")


@pytest.mark.parametrize("where", ["", "data/"])
def test_what_cannot_be_read_twice_is_refused(folder: Path, tmp_path: Path, where: str) -> None:
    """A named pipe would be waited for without end, alone or in a folder."""
    pipe = tmp_path / f"{where}pipe.jsonl"
    os.mkfifo(pipe)
    assert refusal(pipe if not where else folder).startswith(f"{pipe}: a pipe, a device or a socket, expected a file")


def test_a_device_behind_a_link_is_refused(tmp_path: Path) -> None:
    """/dev/zero never ends; a dead link is named as one."""
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "a pipe, a device or a socket" in refusal(tmp_path / "zero.jsonl")
    (tmp_path / "dead.jsonl").symlink_to("gone")
    assert "a link to gone, which is not there" in refusal(tmp_path / "dead.jsonl")


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path: str) -> None:
    """A variable that was not set does not read everything below."""
    with pytest.raises(UserError, match="a source's path is empty"):
        find_data(path, None)


def test_a_dataset_dict_on_disk_gives_one_split(tmp_path: Path) -> None:
    """The one that is asked for, or the only one; never the test rows with the others."""
    saved = tmp_path / "saved"
    parts = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(saved)
    assert [row for _, row in contents(saved, "test")] == [{"a": "test"}]
    assert refusal(saved).startswith(f"{saved}: holds the splits train, test; give one as `split`")
    assert "`split` asks for 'val'" in refusal(saved, "val")
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "one")
    assert [row for _, row in contents(tmp_path / "one")] == [{"a": "train"}]


def test_a_data_set_on_disk_is_what_its_state_lists(tmp_path: Path) -> None:
    """Files that `map` left beside the rows are no rows; a file that is not there is missed."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(saved)
    (rows,) = saved.glob("data-*.arrow")
    (saved / "cache-1.arrow").write_bytes(rows.read_bytes())
    assert len(contents(saved)) == 1
    rows.unlink()
    assert "state.json lists it; is the copy complete?" in refusal(saved)


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    """What editors and notebooks leave in a folder would double its rows."""
    write_rows(tmp_path / "data" / "a.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / ".ipynb_checkpoints" / "a-checkpoint.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / ".a.jsonl", [{"prompt": "q", "response": "a"}])
    assert find_data(str(tmp_path / "data"), None).names == (f"{tmp_path}/data/a.jsonl",)
