"""Memory and time of a source of a million rows, or fewer, and of a tenth of it.

Not a benchmark itself: a part of benchmarks/data.py.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bars import Bar, at_most, table_of
from data_rows import instruction_rows, tokenizer_folder
from pools import Mixed
from process_costs import own_bytes, status_bytes
from rich.console import Console
from sources import rules

from uft_ds.data.mixture import plan_steps
from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.store.selection import Selection
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer


@dataclass
class Memory:
    """Peaks of this process and of those it started, sampled; bytes."""

    before: int = 0
    anonymous: int = 0
    workers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By process: VmHWM, and the peak of RssAnon."""

    @property
    def growth(self) -> int:
        return self.anonymous - self.before


def started_processes() -> list[int]:
    """The workers that this process has spawned."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # The command may hold spaces and parentheses; the parent is the second field after it.
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            is_worker = parent == os.getpid() and b"spawn_main" in (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if is_worker:
            found.append(int(path.name))
    return found


@contextmanager
def sampling(every: float = 0.05) -> Iterator[Memory]:
    memory = Memory(before=own_bytes("RssAnon"))
    done = threading.Event()

    def sample() -> None:
        number = 0
        processes: list[int] = []
        while not done.is_set():
            memory.anonymous = max(memory.anonymous, own_bytes("RssAnon"))
            processes = started_processes() if number % 20 == 0 else processes
            for process in processes:
                peak, anonymous = status_bytes(process, "VmHWM"), status_bytes(process, "RssAnon")
                before = memory.workers.get(process, (0, 0))
                memory.workers[process] = (max(before[0], peak), max(before[1], anonymous))
            number += 1
            done.wait(every)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield memory
    finally:
        done.set()
        sampler.join()
        memory.anonymous = max(memory.anonymous, own_bytes("RssAnon"))


def write_short_rows(data: Path, path: Path, num_rows: int) -> None:
    """Short instructions, again and again, a number in each prompt; written as they come."""
    short = [
        {"prompt": row["prompt"][0]["content"], "response": row["completion"][0]["content"]}
        for row in instruction_rows(data)
        if len(row["prompt"][0]["content"]) + len(row["completion"][0]["content"]) <= 300
    ]
    with path.open("w", encoding="utf-8") as file:
        for number, row in zip(range(num_rows), itertools.cycle(short), strict=False):
            file.write(json.dumps(row | {"prompt": f"{number}. {row['prompt']}"}) + "\n")


def long_source(data: Path, num_rows: int) -> dict[str, Any]:
    """In this process, in which nothing else has been done: what each stage takes."""
    chat = load_tokenizer(str(tokenizer_folder()))
    result: dict[str, Any] = {"rows": num_rows}
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        path = folder / "rows.jsonl"
        write_short_rows(data, path, num_rows)
        result["source_bytes"] = path.stat().st_size
        source = SourceSettings(str(path), None, rules())
        with sampling() as whole:

            def stage(label: str, run: Callable[[], Any]) -> Any:
                start, before = time.perf_counter(), whole.before
                with sampling() as memory:
                    value = run()
                result[label] = {
                    "seconds": time.perf_counter() - start,
                    "growth": memory.anonymous - before,
                    "workers": [list(peaks) for peaks in memory.workers.values()],
                }
                return value

            def prepare(workers: int) -> PreparedSource:
                return prepare_source(source, chat, cache, seed=0, tolerance=Tolerance(), workers=workers)

            store = stage("prepare", lambda: prepare(2)).selection.store
            result["store_bytes"] = sum(file.stat().st_size for file in store.folder.iterdir())
            result["tokens"] = int(store.tokens_U.sum())
            found = stage("open with a warm cache", lambda: TokenStore(store.folder, "rows"))
            pool = Selection(found, np.arange(len(found)))
            ingredients = [Mixed("rows", pool)]
            steps = stage(
                "plan 3 epochs",
                lambda: plan_steps(ingredients, seed=0, examples_per_step=512, epochs=3, steps=None),
            )
            stage("make the last step", lambda: steps[-1])
            walked = np.random.default_rng(0).integers(len(steps), size=200)
            stage("make 200 random steps", lambda: sum(len(steps[int(i)].sequences) for i in walked))
        result["steps"], result["growth"], result["before"] = len(steps), whole.growth, whole.before
    return result


def long_source_apart(data: Path, num_rows: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("data.py")), "--data", str(data), "--one", str(num_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_million(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    small, large = (long_source_apart(data, count) for count in (options.rows // 10, options.rows))
    for result in (small, large):
        megabytes = {name: f"{result[name] / 1e6:.0f} MB" for name in ("source_bytes", "store_bytes", "before")}
        title = (
            f"{result['rows']} rows, {megabytes['source_bytes']}; store {megabytes['store_bytes']}, "
            f"{result['tokens'] / 1e6:.1f} M tokens; {result['steps']} steps of 512; "
            f"parent before: {megabytes['before']}"
        )
        table = table_of(title, "", "seconds", "parent RssAnon +MB", "workers VmHWM MB", "workers RssAnon MB")
        for label, found in result.items():
            if isinstance(found, dict):
                # Later stages may still see the workers end.
                workers = found["workers"] if label == "prepare" else []
                peaks = [" ".join(f"{peak[i] / 1e6:.0f}" for peak in workers) for i in (0, 1)]
                table.add_row(label, f"{found['seconds']:.2f}", f"{found['growth'] / 1e6:.0f}", *peaks)
        console.print(table)
    preparing = [result["prepare"]["growth"] / 1e6 for result in (small, large)]
    per_row = (large["growth"] - small["growth"]) / (large["rows"] - small["rows"])
    console.print(f"  growth of the parent with each row, opening and planning included: {per_row:.0f} bytes")
    return [
        at_most(f"{large['rows']} rows: peak RssAnon of the parent over before, MB", large["growth"] / 1e6, 500),
        at_most("preparing: peak at ten times the rows, MB over that of a tenth", preparing[1] - preparing[0], 50),
    ]
