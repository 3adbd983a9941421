"""A reference is known by content: by what its numbers depend on, and by nothing else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import build_tiny_model
from toy import saved_adapter

from uft_ds.errors import UserError
from uft_ds.host import remembered_hashes
from uft_ds.host.files import sha256
from uft_ds.streams.identity import adapter_identity, base_identity, local_folder, reference_identity, weight_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remembered hashes of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uft_ds" / "sha256"


@pytest.fixture
def base(tiny_qwen2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen2, tmp_path / "base"))


def edit_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_path_does_not_matter_and_the_content_does(base: Path, tiny_qwen2: Path) -> None:
    """A copy is the same model; one flipped bit of a weight, or a config value that changes numbers, is another."""
    first = base_identity(str(base), None)
    assert first == base_identity(str(tiny_qwen2), None)
    edit_config(base, transformers_version="0.0.1", dtype="bfloat16", use_cache=False, architectures=["X"])
    assert base_identity(str(base), None) == first
    edit_config(base, rms_norm_eps=1e-3)
    assert base_identity(str(base), None) != first
    shutil.copy(tiny_qwen2 / "config.json", base)
    flip_a_bit(base / "model.safetensors")
    assert base_identity(str(base), None) != first


def test_hashes_are_remembered_until_a_file_changes(
    base: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing is read; a change with its times set back is seen; a broken memory is no matter."""
    read: list[Path] = []
    monkeypatch.setattr(remembered_hashes, "sha256", lambda path: read.append(path) or sha256(path))
    monkeypatch.setattr(remembered_hashes, "SETTLED_SECONDS", -1.0)
    first = base_identity(str(base), None)
    assert base_identity(str(base), None) == first
    assert len(read) == 1
    weights = base / "model.safetensors"
    times = weights.stat()
    flip_a_bit(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert base_identity(str(base), None) != first
    assert len(read) == 2
    for memory in own_cache.iterdir():
        memory.write_text("torn")
    assert base_identity(str(base), None) != first
    assert len(read) == 3


def test_everything_that_changes_numbers_changes_the_name(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The type computed in, the attention, the adapter and its type; 64 hex digits that never change by themselves."""
    content = {**base_identity(str(tiny_qwen2), None), "adapter": None}
    folder = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    adapter = adapter_identity(folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    louder = adapter_identity(folder)
    config.write_text(config.read_text().replace('"revision": null', '"revision": "main"'))
    assert adapter_identity(folder) == louder
    options = {"dtype": "float32", "attention": "sdpa", "adapter_dtype": None}
    names = [
        reference_identity(content, **options),
        reference_identity(content, **options | {"dtype": "bfloat16"}),
        reference_identity(content, **options | {"attention": "eager"}),
        reference_identity(content | {"adapter": adapter}, **options | {"adapter_dtype": "float32"}),
        reference_identity(content | {"adapter": adapter}, **options | {"adapter_dtype": "bfloat16"}),
        reference_identity(content | {"adapter": louder}, **options | {"adapter_dtype": "float32"}),
    ]
    assert len(set(names)) == 6
    assert names[0] == reference_identity(json.loads(json.dumps(content)), **options)
    assert all(len(name) == 64 and set(name) <= set("0123456789abcdef") for name in names)


def test_shards_are_those_that_the_index_names(base: Path, tmp_path: Path) -> None:
    """Files that transformers would not load do not matter; a missing shard is named."""
    whole = base / "model.safetensors"
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(whole, base / shard)
    shutil.copy(whole, base / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(base)] == ["model.safetensors"]
    whole.unlink()
    assert [path.name for path in weight_files(base)] == sorted(index["weight_map"].values())
    assert len(base_identity(str(base), None)["weights"]) == 2
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.base: .*model-00002-of-00002\.safetensors: cannot be read"):
        base_identity(str(base), None)
    for broken in ("{", "{}", "[]", '{"weight_map": 3}'):
        (base / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(UserError, match=r"index\.json: expected an index of weight files"):
            weight_files(base)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds no weights; expected model\.safetensors"):
        weight_files(base)


def test_a_hub_model_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the snapshot of the asked revision; a model that is not there is a user error that names it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    build_tiny_model(snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert local_folder("some/model", None) == snapshot
    assert local_folder("some/model", "a" * 40) == snapshot
    with pytest.raises(UserError, match=r"model\.base: the files of 'other/model' cannot be downloaded from the hub"):
        local_folder("other/model", None)
