"""A damaged store is refused, and named."""

import json
from pathlib import Path

import pytest
from stores import pair, singles, write

from uft_ds.data.store.store_files import Place, check_content
from uft_ds.data.store.token_store import TokenStore
from uft_ds.errors import UserError


@pytest.mark.parametrize("name", ["tokens", "sequences", "units", "responses"])
def test_a_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    """A file shorter than the index says, or missing, is named, with the remedy."""
    write(tmp_path / "s", singles(3))
    path = tmp_path / "s" / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}\.bin: \d+ bytes, expected \d+; delete .*built again"):
        TokenStore(tmp_path / "s", "label")
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.bin: 0 bytes, expected"):
        TokenStore(tmp_path / "s", "label")


@pytest.mark.parametrize("name", ["tokens", "sequences", "units", "responses"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    """Sizes stay the same, so opening the store does not see it: what trains on it reads it through once."""
    folder = tmp_path / "s"
    write(folder, singles(2), [(pair(1), Place(0, 9, 0))])
    check_content(folder)
    path = folder / f"{name}.bin"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        TokenStore(folder, "label")
        with pytest.raises(UserError, match=rf"{name}\.bin: its content is not what was written.*built again"):
            check_content(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.bin: cannot be read"):
        check_content(folder)


def test_a_store_without_hashes_is_of_an_older_version(tmp_path: Path) -> None:
    """It cannot be compared with anything; a run that began with it goes on."""
    write(tmp_path, singles(2))
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    check_content(tmp_path)
