"""What a block may take is limited; outside of it nothing is."""

import resource
import threading
import time

import pytest

from uft_ds.host.bounded import bounded

PLENTY = 1 << 32


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_block_that_takes_longer_is_ended() -> None:
    started = time.process_time()
    with pytest.raises(TimeoutError), bounded(seconds=0.05, memory=PLENTY):
        spend(10)
    assert time.process_time() - started < 5


def test_a_block_that_takes_more_memory_is_ended() -> None:
    with pytest.raises(MemoryError), bounded(seconds=10, memory=50_000_000):
        bytearray(200_000_000)


def test_nothing_is_limited_outside() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded(seconds=0.05, memory=50_000_000):
        assert len(bytearray(10_000_000)) == 10_000_000
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(200_000_000)) == 200_000_000
    spend(0.2)


def test_waiting_costs_no_time_of_a_block() -> None:
    with bounded(seconds=0.05, memory=PLENTY):
        time.sleep(0.2)


def test_memory_is_limited_in_another_thread_too() -> None:
    found: list[type[BaseException]] = []

    def work() -> None:
        try:
            with bounded(seconds=10, memory=50_000_000):
                bytearray(200_000_000)
        except MemoryError as error:
            found.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [MemoryError]
