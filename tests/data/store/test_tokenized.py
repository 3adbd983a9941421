"""The cache of tokenised sources: what was tokenised is never tokenised again, and never taken for something else."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forking import forking
from sources import rules, write_rows
from tiny import CHATML

from uft_ds.data.rows.reading import find_data
from uft_ds.data.store import tokenized
from uft_ds.data.store.store_files import INDEX
from uft_ds.data.store.tokenized import ensure_store, is_whole, open_store, read_key_parts, store_key
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError

ROWS = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def ensure(path: Path, chat: ChatTokenizer, cache: Path, **changes: Any) -> str:
    quarantine = changes.pop("quarantine", False)
    return ensure_store(find_data(str(path), None), rules(**changes), chat, cache, quarantine=quarantine)


def test_the_second_time_nothing_is_tokenised(
    path: Path, chat: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is there is used as it is."""
    key = ensure(path, chat, tmp_path / "cache")
    assert len(open_store(tmp_path / "cache", key, "rows")) == 10
    monkeypatch.setattr(tokenized, "build_store", lambda *args, **kwargs: pytest.fail("built again"))
    assert ensure(path, chat, tmp_path / "cache") == key


def test_a_store_that_has_changed_is_not_used(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """One bit of a token, or of what the store was built from: every run that shares it would learn another word."""
    cache = tmp_path / "cache"
    key = ensure(path, chat, cache)
    parts = read_key_parts(cache, key)
    for name in ("tokens.bin", "key.json"):
        file = cache / key / name
        good = file.read_bytes()
        file.write_bytes(good.replace(b'"content": "', b'"content": "0') if name == "key.json" else good[:-1] + b"\1")
        with pytest.raises(UserError, match=rf"{name}: .*its content is not what was written.*built again"):
            read_key_parts(cache, ensure(path, chat, cache))
        file.write_bytes(good)
    assert read_key_parts(cache, ensure(path, chat, cache)) == parts


def test_the_key_is_of_the_content(
    path: Path, chat: ChatTokenizer, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving or renaming a file keeps its key; every byte, rule, template, tokenizer, version and code is in it."""

    def key_of(file: Path = path, tokenizer: ChatTokenizer = chat, **changes: Any) -> str:
        return store_key(find_data(str(file), None), rules(**changes), tokenizer)

    first = key_of()
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert key_of(moved) == first

    others = [key_of(**{name: value}) for name, value in (
        ("format", "trl"), ("score", 0.5), ("max_length", 511), ("merge", False), ("trim_prompt", True),
        ("split_pairs", True), ("where", (("a", 1),)),
    )]  # fmt: skip
    moved.write_bytes(path.read_bytes().replace(b"q3", b"q4"))
    others.append(key_of(moved))
    array = tmp_path / "rows.json"
    shutil.copy(path, array)
    others.append(key_of(array))
    (tmp_path / "template.jinja").write_text(CHATML.replace("\\n", "|"))
    template = load_tokenizer(str(tokenizer_folder), chat_template=str(tmp_path / "template.jinja"))
    others.append(key_of(tokenizer=template))
    larger = load_tokenizer(str(tokenizer_folder))
    larger.tokenizer.add_tokens(["qa"])
    others.append(key_of(tokenizer=larger))
    others.append(key_of(tokenizer=replace(chat, placeholders=("<|endoftext|>",))))
    with monkeypatch.context() as patch:
        patch.setattr(tokenized.importlib.metadata, "version", lambda name: "0.0")
        others.append(key_of())
    with monkeypatch.context() as patch:
        patch.setattr(tokenized, "sha256", lambda file: str(file))
        others.append(key_of())
    assert len({first, *others}) == 1 + len(others)
    assert key_of() == first


def test_a_refused_source_leaves_nothing(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """After a bad row there is no store, and no half of one."""
    with pytest.raises(UserError, match=r"rows\.jsonl:11: "):
        ensure(write_rows(path, [*ROWS, {"prompt": "q"}]), chat, tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written_is_refused(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """The message names the key of the recipe and the folder, whatever the system says of it."""
    (tmp_path / "file").write_text("")
    for folder, why in (
        (tmp_path / "file" / "cache", "Not a directory"),
        (Path("/proc/nowhere/cache"), "No such file"),
    ):
        with pytest.raises(UserError, match=rf"data\.cache_dir: {folder} cannot be written \({why}"):
            ensure(path, chat, folder)


def test_a_damaged_store_is_made_anew(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """A folder without an index is no store, whatever lies in it."""
    key = ensure(path, chat, tmp_path / "cache")
    (tmp_path / "cache" / key / INDEX).unlink()
    assert not is_whole(tmp_path / "cache" / key)
    with pytest.raises(UserError, match=r"its tokens are not in .* any more"):
        open_store(tmp_path / "cache", key, "rows")
    assert ensure(path, chat, tmp_path / "cache") == key
    assert len(open_store(tmp_path / "cache", key, "rows")) == 10


def _slow_ensure(path: Path, tokenizer_folder: Path, cache: Path, log: Path, seconds: float) -> None:
    chat, build = load_tokenizer(str(tokenizer_folder)), tokenized.build_store

    def slow(*args: Any, **kwargs: Any) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        build(*args, **kwargs)
        time.sleep(seconds)

    tokenized.build_store = slow
    ensure(path, chat, cache)


def test_of_two_processes_one_works(path: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Two processes that want the same source at the same time: one tokenises it, the other waits and uses it."""
    arguments = (path, tokenizer_folder, tmp_path / "cache", tmp_path / "log", 2.0)
    context = forking()
    processes = [context.Process(target=_slow_ensure, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_killed_builder_is_replaced(path: Path, chat: ChatTokenizer, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The lock ends with the process that held it, and what it left behind is cleared away."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    context = forking()
    process = context.Process(target=_slow_ensure, args=(path, tokenizer_folder, cache, log, 600.0))
    process.start()
    deadline = time.monotonic() + 120
    while not list(cache.glob(".*.tmp/index.json")):
        assert time.monotonic() < deadline, "the builder has not begun"
        time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(timeout=60)
    key = ensure(path, chat, cache)
    assert len(open_store(cache, key, "rows")) == 10
    assert list(cache.glob(".*.tmp")) == []


def test_a_file_that_grows_meanwhile_is_refused(
    path: Path, chat: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was tokenised would not be what its name says."""
    build = tokenized.build_store

    def growing(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        write_rows(path, [*ROWS, ROWS[0]])

    monkeypatch.setattr(tokenized, "build_store", growing)
    with pytest.raises(UserError, match=r"rows\.jsonl: changed while it was read"):
        ensure(path, chat, tmp_path / "cache")
    monkeypatch.setattr(tokenized, "build_store", build)
    assert len(open_store(tmp_path / "cache", ensure(path, chat, tmp_path / "cache"), "rows")) == 11


def test_quarantined_rows_are_part_of_the_store(path: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """A source that was built with quarantine has the same key: whether that is accepted is asked when it is opened."""
    write_rows(path, [*ROWS, {"prompt": "q"}])
    key = ensure(path, chat, tmp_path / "cache", quarantine=True)
    assert open_store(tmp_path / "cache", key, "rows").account.quarantined == 1
    assert ensure(path, chat, tmp_path / "cache") == key


def test_rules_are_plain_values() -> None:
    """Rules are hashable and comparable: two equal ones name the same store."""
    assert replace(rules(), max_length=9) == rules(max_length=9)
    assert hash(rules()) == hash(rules())
