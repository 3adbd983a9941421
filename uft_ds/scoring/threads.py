"""Work on several items at once, by threads that end with the process and never keep it from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_MEANWHILE_SECONDS = 0.2


def in_threads(
    work: Callable[[_In], _Out],
    items: Sequence[_In],
    threads: int,
    on_error: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[_Out]:
    """The results in the order of the items.

    Not a ThreadPoolExecutor: the interpreter waits for its threads, and a request to a slow judge would hold up Ctrl-C.

    Args:
        on_error: called when `work` has raised, before what is under way is waited for.
        meanwhile: called again and again by the thread that waits. If it raises, the rest is not begun, and what is
            under way is not waited for.
    Raises:
        BaseException: the first one that `work` raised. What was under way is done then, and the rest is not begun.
    """
    waiting: queue.SimpleQueue[tuple[int, _In]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, _Out | None, BaseException | None]] = queue.SimpleQueue()
    ended = threading.Event()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def run() -> None:
        while not ended.is_set():
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(item), None))
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                ended.set()  # at once: the thread that waits may be late to hear of it on a busy machine
                done.put((index, None, error))

    results: dict[int, _Out] = {}
    started = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    try:
        for thread in started:
            thread.start()
        while len(results) < len(items):
            meanwhile()
            try:
                index, result, error = done.get(timeout=_MEANWHILE_SECONDS)
            except queue.Empty:
                continue
            if error is not None:
                ended.set()
                on_error()
                for thread in started:
                    thread.join()
                raise error
            results[index] = cast(_Out, result)
    finally:
        ended.set()
    return [results[index] for index in range(len(items))]
