"""Examples a second from a jsonl file to tokens that are ready to train on, beside TRL's preparation; and by stages.

Not a benchmark itself: a part of benchmarks/data.py.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from bars import Bar, at_most, table_of
from data_rows import MAX_LENGTH, instruction_rows, joined_conversations, pair_rows, prepared, repeated
from rich.console import Console
from sources import write_rows

from uft_ds.data.store import building
from uft_ds.data.tokens import chat_template
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


@dataclass
class Timing:
    """Of one way to prepare a file: seconds of each round, and of the processor over all its processes."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    kept: int = 0
    """Responses."""
    supervised: int = 0
    """Tokens."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def cpu(self) -> float:
        return float(np.median(self.cpu_seconds))


def prepare_ours(path: Path, chat: ChatTokenizer, cache: Path, workers: int) -> tuple[int, int]:
    """Responses kept, and supervised tokens."""
    selection = prepared(path, chat, cache, workers=workers).selection
    responses = selection.store.responses
    return selection.num_responses, int((responses["end"] - responses["start"]).sum())


def prepare_by_trl(path: Path, chat: ChatTokenizer, cache: Path, processes: int | None) -> tuple[int, int]:
    """By the trainers' own method, of which only the model and its loop are left out."""
    import datasets
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    of_pairs = "chosen" in rows.column_names
    config: Any = (DPOConfig if of_pairs else SFTConfig)(
        output_dir=str(cache), max_length=MAX_LENGTH, dataset_num_proc=processes, report_to="none", bf16=False
    )
    if of_pairs:
        trainer: Any = SimpleNamespace(_tokenizer=chat.tokenizer)
        found = DPOTrainer._prepare_dataset(trainer, rows, chat.tokenizer, config, "train")
        return 2 * len(found), sum(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in found[side])
    trainer = SimpleNamespace(_tokenizer=chat.tokenizer, chat_template=None, completion_only_loss=True)
    found = SFTTrainer._prepare_dataset(trainer, rows, chat.tokenizer, config, False, None, "train")
    return len(found), sum(label != -100 for labels in found["labels"] for label in labels)


def measure_preparation(path: Path, chat: ChatTokenizer, rounds: int) -> dict[str, Timing]:
    """All ways in turn, so often; counting TRL's tokens is not timed, reading the file is."""
    ways: dict[str, Callable[[Path], tuple[int, int]]] = {
        "uft_ds, 1 process": lambda cache: prepare_ours(path, chat, cache, 1),
        "uft_ds, 2 workers": lambda cache: prepare_ours(path, chat, cache, 2),
    }
    if release("trl"):
        ways |= {
            "TRL, 1 process": lambda cache: prepare_by_trl(path, chat, cache, None),
            "TRL, num_proc=2": lambda cache: prepare_by_trl(path, chat, cache, 2),
        }
    timings = {name: Timing() for name in (*ways, "uft_ds, warm cache")}
    for _ in range(rounds):
        for name, run in ways.items():
            with tempfile.TemporaryDirectory() as cache:
                _timed(timings[name], lambda run=run, cache=cache: run(Path(cache)))  # type: ignore[misc]
                if name == "uft_ds, 1 process":
                    _timed(timings["uft_ds, warm cache"], lambda cache=cache: prepare_ours(path, chat, Path(cache), 1))  # type: ignore[misc]
    return timings


def _timed(timing: Timing, run: Callable[[], tuple[int, int]]) -> None:
    start, cpu = time.perf_counter(), _cpu_seconds()
    timing.kept, timing.supervised = run()
    timing.seconds.append(time.perf_counter() - start)
    timing.cpu_seconds.append(_cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process and of those it started, which are waited for: until then theirs are not known."""
    while multiprocessing.active_children():
        time.sleep(0.05)
    return sum(os.times()[:4])


STAGES: dict[str, tuple[Any, str]] = {
    "parse JSON": (building, "parse_row"),
    "render the template": (chat_template, "render_jinja_template"),
    "tokenize": (ChatTokenizer, "encode"),
    "search for control tokens": (ChatTokenizer, "holds_control_token"),
    "arrays and keys": (building, "pack_units"),
    "examine rows, with all of these": (building, "examine_row"),
}
"""What of a row's way is timed, by the functions that do it."""


@contextmanager
def timing_stages() -> Iterator[dict[str, float]]:
    """Seconds inside each stage of this process; a clock around each call, no profiler."""
    seconds: dict[str, float] = defaultdict(float)

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(mock.patch.object(owner, name, clocked(stage, getattr(owner, name))))
        yield seconds


def show_stages(console: Console, title: str, path: Path, chat: ChatTokenizer, num_rows: int, **changes: Any) -> None:
    with tempfile.TemporaryDirectory() as cache, timing_stages() as seconds:
        start = time.perf_counter()
        prepared(path, chat, Path(cache), **changes)
        seconds["in all"] = time.perf_counter() - start
    table = table_of(f"where the time goes in one process: {title}", "", "us a row", "share")
    for stage in (*STAGES, "in all"):
        table.add_row(
            stage, f"{seconds[stage] / num_rows * 1e6:.0f}", f"{seconds[stage] / seconds['in all']:.0%}"
        )  # fmt: skip
    console.print(table)


def report_preparation(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    files = {
        "instruction": write_rows(folder / "instruction.jsonl", repeated(instruction_rows(data), options.prepare_rows)),
        "pairs": write_rows(folder / "pairs.jsonl", repeated(pair_rows(data), options.prepare_rows // 4)),
    }
    if not release("trl"):
        console.print("TRL is not installed (extra `bench`): measured without it")
    else:
        import datasets
        from trl import DPOTrainer, SFTTrainer  # noqa: F401 - imported before the clock runs

        datasets.disable_progress_bars()
        datasets.disable_caching()
    bars = []
    for name, path in files.items():
        num_rows = sum(1 for _ in path.open(encoding="utf-8"))
        timings = measure_preparation(path, chat, options.rounds)
        title = f"preparing {num_rows} rows: {name} ({path.stat().st_size / 1e6:.0f} MB), {options.rounds} rounds"
        table = table_of(
            title, "", "rows/s", "seconds", "/ uft_ds", "CPU us a row", "/ uft_ds", "responses", "supervised tokens"
        )
        for way, timing in timings.items():
            reference = timings["uft_ds, 2 workers" if "2" in way else "uft_ds, 1 process"]
            table.add_row(
                way, f"{num_rows / timing.median:.0f}", f"{timing.median:.1f}",
                f"{timing.median / reference.median:.2f}",
                f"{timing.cpu / num_rows * 1e6:.0f}",
                f"{timing.cpu / reference.cpu:.2f}",
                str(timing.kept), str(timing.supervised),
            )  # fmt: skip
        console.print(table)
        if "TRL, 1 process" in timings:
            # No bar on two processes: at this size it is their start that is measured.
            ratio = timings["uft_ds, 1 process"].cpu / timings["TRL, 1 process"].cpu
            bars.append(at_most(f"preparing {name}: CPU time in one process / TRL's", ratio, 1.0))
        show_stages(console, name, path, chat, num_rows)
    single = repeated(instruction_rows(data), options.prepare_rows // 4)
    conversations = write_rows(folder / "conversations.jsonl", joined_conversations(single, (2, 7), seed=0))
    count = sum(1 for _ in conversations.open(encoding="utf-8"))
    for merge in (True, False):
        title = f"{count} conversations of 2 to 7 answers, {'merged' if merge else 'unfolded'}"
        show_stages(console, title, conversations, chat, count, merge=merge)
    return bars


def release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
