"""Ranks that a machine has no room for are refused before the launch, by a lower bound of what they need."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import build_tiny_model
from transformers import AutoModelForCausalLM

from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.host.memory import memory_limit_bytes
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, settings_of
from uft_ds.run.room import PROCESS_BYTES, check_room, core_notes
from uft_ds.run.start import run_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a model whose files are float32."""
    folder = tmp_path_factory.mktemp("room")
    tree: dict[str, Any] = {
        "name": "x",
        "model": {"base": str(build_tiny_model(folder / "base")), "dtype": "float32"},
        "data": {"sources": [{"format": "jsonl", "path": "no.jsonl"}]},
        "deepspeed": "zero3_cpu",
        "output": str(folder / "run"),
    }
    return settings_of(recipe_from_tree(tree, "x"))


def weights_of(settings: Settings, item_bytes: int = 4) -> int:
    model = AutoModelForCausalLM.from_pretrained(settings.model.base)
    return sum(parameter.numel() for parameter in model.parameters()) * item_bytes


def need(settings: Settings, monkeypatch: pytest.MonkeyPatch, *, ranks: int, has_gpu: bool = False) -> int:
    """The smallest memory, to the byte, with which the ranks are not refused."""
    least, most = 0, 10**12
    while least < most:
        limit = (least + most) // 2
        monkeypatch.setattr("uft_ds.run.room.memory_limit_bytes", lambda limit=limit: limit)
        try:
            check_room(with_deepspeed_file(settings), ranks=ranks, has_gpu=has_gpu)
        except UserError:
            least = limit + 1
        else:
            most = limit
    return least


def test_each_rank_is_a_process_and_shards_are_one_copy(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 on CPUs; on GPUs the weights take host memory only if they are offloaded."""
    weights = weights_of(settings)
    for ranks in (1, 2, 8):
        assert need(settings, monkeypatch, ranks=ranks) == ranks * PROCESS_BYTES + weights
    for file, copies in (("zero3", 0), ("zero3_offload", 1), ("zero2", 0)):
        on_gpus = changed(settings, {"deepspeed": file})
        assert need(on_gpus, monkeypatch, ranks=2, has_gpu=True) == 2 * PROCESS_BYTES + copies * weights


def test_a_copy_of_the_base_takes_as_much_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference of a base that is trained: under ZeRO-3 in host memory on GPUs, too."""
    copied, weights = changed(settings, {"lora": None, "reference.cache": False}), weights_of(settings)
    assert need(copied, monkeypatch, ranks=2) == 2 * PROCESS_BYTES + 2 * weights
    for file, copies in (("zero3", 1), ("zero3_offload", 2), ("zero2", 0)):
        on_gpus = changed(copied, {"deepspeed": file})
        assert need(on_gpus, monkeypatch, ranks=2, has_gpu=True) == 2 * PROCESS_BYTES + copies * weights


def test_below_stage_3_files_of_the_same_type_are_shared(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks map the files, so a copy is one; of another type, each rank converts a copy of its own."""
    whole = changed(settings, {"deepspeed": "zero2", "lora.dtype": "float32"})
    assert need(whole, monkeypatch, ranks=4) == 4 * PROCESS_BYTES + weights_of(settings)
    other = changed(settings, {"deepspeed": "zero2", "model.dtype": "bfloat16", "lora.dtype": "bfloat16"})
    assert need(other, monkeypatch, ranks=4) == 4 * (PROCESS_BYTES + weights_of(settings, 2))


def test_a_refusal_says_what_needs_what_and_what_to_do(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `uft train`'s own path, before the data is looked for, which does not exist here; nothing is written."""
    monkeypatch.setattr("uft_ds.run.room.memory_limit_bytes", lambda: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = changed(settings, {"launch.ranks": 8})
    with pytest.raises(UserError) as caught:
        run_settings(asked, "training", Console(file=io.StringIO()))
    assert re.fullmatch(
        r"launch\.ranks: 8 ranks need at least 0\.6 GB of host memory \(0\.6 GB for the processes, 0\.0 GB for the "
        r"weights in float32\), and this machine or its container has 0\.5 GB; set launch\.ranks below 8, or .*",
        str(caught.value),
    )
    assert not asked.output.exists()


def test_what_fits_is_not_refused(settings: Settings) -> None:
    """On this machine, whose tests run two ranks of such models."""
    check_room(with_deepspeed_file(settings), ranks=2, has_gpu=False)


def test_more_ranks_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as cores are not."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert list(core_notes(ranks=2)) == []
    assert ["8 ranks share 2 cores" in note for note in core_notes(ranks=8)] == [True]


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "5000000"}, 5_000_000),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/memory.max": "7000000"}, 7_000_000),
        ("4:memory:/a\n0::/\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "6000000"}, 6_000_000),
        ("4:memory:/elsewhere\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "8000000"}, 8_000_000),
        ("5:cpu:/a\n", {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9000000"}, None),
        ("0::/a\n", {}, None),
        (
            "0::/a\n",
            {"sys/fs/cgroup/a/memory.max": "5000000", "sys/fs/cgroup/a/memory.swap.max": "2000000"},
            7_000_000,
        ),
        ("0::/a\n", {"sys/fs/cgroup/a/memory.max": "5000000", "sys/fs/cgroup/a/memory.swap.max": "max"}, 5_000_300),
    ],
)
def test_a_container_has_its_own_limit(
    tmp_path: Path, group: str, files: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of control groups of version 1 and 2, whichever group around the process sets it; otherwise the machine's. Swap
    comes on top of it: the group's own limit of swap, or the machine's swap."""
    swap = 300 if "max" in files.get("sys/fs/cgroup/a/memory.swap.max", "") else 0
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=swap))
    for name, text in {"proc/self/cgroup": group, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = memory_limit_bytes(tmp_path)
    assert found == expected if expected is not None else found > 10**8
