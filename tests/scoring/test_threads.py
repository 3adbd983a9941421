"""Several items at once: what is begun after an error."""

from __future__ import annotations

import threading
import time

import pytest

from uft_ds.scoring.threads import in_threads


def test_nothing_is_begun_after_an_error_although_the_waiting_thread_is_late() -> None:
    """A server's refusal of one request ends the round: each thread has begun one item, and no second one."""
    begun: list[int] = []
    all_have_begun = threading.Barrier(3)

    def refuse(item: int) -> None:
        begun.append(item)
        if len(begun) <= 3:
            all_have_begun.wait()
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        in_threads(refuse, range(20), 3, meanwhile=lambda: time.sleep(0.3))
    assert len(begun) == 3


def test_the_results_have_the_order_of_the_items() -> None:
    """Also when later items are done before earlier ones."""
    assert in_threads(lambda seconds: time.sleep(seconds) or seconds, [0.2, 0.1, 0.0], 3) == [0.2, 0.1, 0.0]
