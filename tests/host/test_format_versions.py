"""Files of another version of uft_ds: one clear message each, and none is called damaged or moved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import whole_checkpoint
from safetensors.numpy import save_file

from uft_ds.checkpoint.folder import latest_checkpoint, newest_whole
from uft_ds.checkpoint.manifest import MANIFEST, manifest_problem
from uft_ds.checkpoint.state import TRAINER, Position, TrainerState, read_position, write_position
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import INDEX
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.store.writing import StoreWriter
from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.formats import UnknownFormat, check_format
from uft_ds.known.store import ReferenceStore, read_table, write_table
from uft_ds.recipe.file import dump_recipe, load_recipe, stored_recipe

IDENTITY = "a" * 64


def with_format(path: Path, version: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))


def test_an_unknown_version_names_file_versions_and_remedy() -> None:
    """A newer one, an older one, and what is no number; no number at all is the first version."""
    check_format("a.json", None, 1, "do this")
    check_format("a.json", 2, 2, "do this")
    for found, known, words in ((3, 2, "newer uft_ds: update it, or do this"), (None, 2, "older uft_ds, or do this")):
        with pytest.raises(UnknownFormat, match=rf"^a\.json: format {found or 1} found, .* format {known}: .*{words}"):
            check_format("a.json", found, known, "do this")
    for found in ("1", 1.0, True, 0, [1]):
        with pytest.raises(UnknownFormat, match="expected a whole number"):
            check_format("a.json", found, 1, "do this")


def test_a_checkpoint_of_a_newer_version_is_refused_not_damaged(tmp_path: Path) -> None:
    """A resume must not set it aside and go on from an older one, and a conversion says the same of it."""
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    whole_checkpoint(checkpoint)
    assert manifest_problem(checkpoint) is None
    assert json.loads((checkpoint / MANIFEST).read_text())["format"] == 1
    with_format(checkpoint / MANIFEST, 2)
    for read in (newest_whole, latest_checkpoint):
        with pytest.raises(UserError, match=r"^[^ ]*manifest\.json: format 2 found, this uft_ds reads format 1"):
            read(tmp_path)


def test_a_position_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """trainer.json, also where its other keys have gone."""
    write_position(tmp_path, Position(TrainerState(3, 1, 0.5), 10))
    assert read_position(tmp_path).state.step == 3
    (tmp_path / TRAINER).write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"trainer\.json: format 2 found, this uft_ds reads format 1"):
        read_position(tmp_path)


def test_a_token_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """Its index is read before anything else, and one that lacks keys is an error of the user's, too."""
    writer = StoreWriter(tmp_path)
    writer.finish(["rows.jsonl"], Account(0, {}, {}, {}, 0, 0))
    assert len(TokenStore(tmp_path, "rows")) == 0
    (tmp_path / INDEX).write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"index\.json: format 2 found.*prepares the data again"):
        TokenStore(tmp_path, "rows")
    for text in ('{"format": 1}', "[]", "{"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UserError, match=r"index\.json: .*prepares the data again"):
            TokenStore(tmp_path, "rows")


def test_a_reference_table_of_a_newer_version_stays_where_it_is(tmp_path: Path) -> None:
    """Another run, of the newer version, reads it: it is neither used nor renamed here."""
    store = ReferenceStore(tmp_path, IDENTITY)
    store.write({b"k" * 16: -1.0})
    newer = tmp_path / "newer"
    tensors = {"keys": np.full((1, 16), 7, dtype=np.uint8), "logps": np.array([-2.0])}
    save_file(tensors, newer, metadata={"reference": json.dumps({"format": 2, "identity": IDENTITY})})
    named = newer.rename(tmp_path / f"{sha256(newer)}.safetensors")
    found = store.read()
    assert found.table == {b"k" * 16: -1.0}
    assert named.exists()
    assert len(found.problems) == 1
    assert "format 2 found, this uft_ds reads format 1" in found.problems[0]
    with pytest.raises(UserError, match="format 2 found"):
        read_table(named, IDENTITY)
    write_table(tmp_path / "own", {b"k" * 16: -1.0}, IDENTITY)
    assert read_table(tmp_path / "own", IDENTITY) == {b"k" * 16: -1.0}


def test_a_stored_recipe_is_read_like_one_that_was_written(tmp_path: Path) -> None:
    """Overrides too; its version is no key of a recipe, and a newer one is refused before any key is."""
    (tmp_path / "written.yaml").write_text(
        "name: x\nmodel: {base: b}\ndata: {sources: [{format: jsonl, path: p}]}\nobjective: {}\noutput: o\n"
    )
    recipe = load_recipe(str(tmp_path / "written.yaml"))
    path = tmp_path / "recipe.yaml"
    path.write_text(stored_recipe(recipe))
    assert path.read_text().startswith("recipe_format: 1\n")
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path), ("train.steps=3",)).train.steps == 3
    assert "recipe_format" not in dump_recipe(recipe)
    # A run of a version that drew each row by itself goes on so.
    path.write_text(re.sub("  share_prompts: .*\n", "", stored_recipe(recipe)))
    assert (recipe.data.share_prompts, load_recipe(str(path)).data.share_prompts) == (True, False)
    path.write_text("recipe_format: 2\nsomething: else\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: format 2 found, this uft_ds reads format 1: .*update it"):
        load_recipe(str(path))
