"""What a rank does with a signal, alone: noted or heeded, once, and what its helpers get of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from uft_ds.errors import Stopped
from uft_ds.host.process import helpers_without_usr1
from uft_ds.host.signals import STOP_SIGNALS, Stop, StopRequest, listen


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_first_step_a_signal_ends_the_rank(number: signal.Signals) -> None:
    """Wherever it is; a second one does not disturb the leaving."""
    request = listen()
    request.heed()
    with pytest.raises(Stopped, match=f"stopped by {number.name} before it trained"):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.number == number


def test_while_modules_are_imported_it_is_noted() -> None:
    """The first one; it ends the rank afterwards."""
    request = listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGUSR1 before it trained"):
        request.heed()


def test_while_steps_are_run_it_is_noted() -> None:
    """The first one; until all ranks ask each other."""
    request = listen()
    request.heed()
    request.only_note()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.number == signal.SIGUSR1


def test_what_one_rank_has_heard_stops_all() -> None:
    """This rank has heard nothing, another one has."""
    Stop(StopRequest(), lambda own: max(own, 0)).check()
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        Stop(StopRequest(), lambda own: max(own, signal.SIGTERM)).check()


def test_helpers_never_get_sigusr1() -> None:
    """One that has just been started, without a handler, survives it; this thread gets its own once the block ends."""
    request = listen()
    request.only_note()
    with helpers_without_usr1():
        program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
        helper = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        signal.raise_signal(signal.SIGUSR1)  # to this thread: of the process, other tests' threads could take it
        assert request.number == 0
    assert request.number == signal.SIGUSR1
    assert helper.stdout == "alive\n"
