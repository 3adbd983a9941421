"""Ranks forked from the command: their environment, their exit codes, and that none is left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from uft_ds.host.signals import StopRequest
from uft_ds.run import forked
from uft_ds.run.forked import RankServer, rank_server
from uft_ds.run.launch import rank_environment
from uft_ds.run.order import Order

Program = Callable[[StopRequest, list[str]], int]
Start = Callable[[Program], RankServer]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts two ranks that run a function instead of `uft_ds.train`: what is forked has what the test has set."""
    servers = []

    def started(program: Program) -> RankServer:
        monkeypatch.setattr(forked, "main", program)
        context = rank_server()
        server = context.__enter__()
        assert server is not None
        servers.append(context)
        return server.start(order(tmp_path))

    yield started
    for context in servers:
        context.__exit__(None, None, None)
    assert not [child for child in psutil.Process().children(recursive=True) if title_of(child).startswith("uft_ds")]


def title_of(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()


def order(folder: Path, *arguments: str) -> Order:
    environment = rank_environment(2) | {"ONLY_HERE": "yes"}
    return Order((str(folder), *arguments), environment, num_ranks=2, port=1234, log=folder / "launcher.log")


def ended(server: RankServer, seconds: float = 60) -> dict[int, int]:
    codes = server.poll(seconds)
    assert codes is not None, "still running"
    return codes


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tell(request: StopRequest, arguments: list[str]) -> int:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ONLY_HERE")
    told = {name: os.environ.get(name) for name in names}
    found = {"environment": told, "arguments": arguments, "title": title_of(psutil.Process())}
    Path(arguments[0], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    return 0


def test_a_rank_is_told_what_a_launcher_tells(start: Start, tmp_path: Path) -> None:
    """By the variables of torchrun; `ps` shows which rank it is. A server runs one order after the other."""
    server = start(tell)
    assert ended(server) == {0: 0, 1: 0}
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["arguments"] == [str(tmp_path)]
        assert found["title"] == f"uft_ds.train {tmp_path} (rank {rank})"
        assert found["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1234",
            "ONLY_HERE": "yes",
        }
    server.start(order(tmp_path, "again"))
    assert ended(server) == {0: 0, 1: 0}
    assert json.loads((tmp_path / "rank1.json").read_text())["arguments"] == [str(tmp_path), "again"]


def test_a_variable_that_is_not_utf_8_is_handed_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment holds bytes; one of them must not end the server or a rank."""
    monkeypatch.setenv("IN_LATIN_1", os.fsdecode(b"caf\xe9"))
    assert ended(start(tell)) == {0: 0, 1: 0}


def one_is_killed(request: StopRequest, arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
    return 0


def test_the_failed_rank_is_blamed_and_the_others_end(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only SIGKILL ends rank 0: before its first step it would leave at SIGTERM, here it only notes it."""
    monkeypatch.setattr(forked, "SECONDS_TO_STOP", 0.5)
    assert ended(start(one_is_killed)) == {1: -signal.SIGKILL}


def raises(request: StopRequest, arguments: list[str]) -> int:
    raise ValueError("never seen before")


def test_a_crash_is_exit_code_1_and_its_traceback_is_kept(start: Start, tmp_path: Path) -> None:
    """In the launcher's log, as long as the rank has none of its own."""
    codes = ended(start(raises))
    assert set(codes.values()) == {1}
    assert "ValueError: never seen before" in (tmp_path / "launcher.log").read_text()


def stops_when_asked(request: StopRequest, arguments: list[str]) -> int:
    Path(arguments[0], f"started{os.environ['RANK']}").touch()
    while not request.number:
        time.sleep(0.01)
    return 85 if request.number == signal.SIGUSR1 else 1


def test_a_request_reaches_all_ranks(start: Start, tmp_path: Path) -> None:
    """All of them save a checkpoint, and leave with the same code."""
    server = start(stops_when_asked)
    wait_for(tmp_path / "started0", tmp_path / "started1")
    assert server.poll(0) is None
    server.ask_to_stop()
    codes = ended(server)
    assert set(codes.values()) == {85}


def test_ranks_end_at_once_where_that_is_asked(start: Start, tmp_path: Path) -> None:
    """By a second Ctrl-C."""
    server = start(stops_when_asked)
    wait_for(tmp_path / "started0", tmp_path / "started1")
    server.end()
    assert not [child for child in psutil.Process().children(recursive=True) if "(rank" in title_of(child)]


def test_a_command_that_leaves_takes_its_ranks_along(start: Start, tmp_path: Path) -> None:
    """By an error of its own, while they run; the fixture looks for what is left."""
    start(stops_when_asked)
    wait_for(tmp_path / "started0", tmp_path / "started1")


def test_a_server_that_dies_is_noticed(start: Start, tmp_path: Path) -> None:
    """It is not waited for; its ranks die with it. A sweep starts its next run by other means."""
    server = start(stops_when_asked)
    wait_for(tmp_path / "started0", tmp_path / "started1")
    (process,) = (child for child in psutil.Process().children() if title_of(child) == "uft_ds ranks")
    assert server.is_alive
    process.kill()
    assert ended(server) == {}
    assert ended(server.start(order(tmp_path))) == {}
    assert not server.is_alive


def test_a_rank_that_cannot_be_forked_ends_the_others(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a limit of processes. The first rank would wait for the second one, and the command for both."""
    as_ever = ForkProcess.start

    def start_all_but_rank_1(process: Any) -> None:
        if process._args[1:] == (1,):
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        as_ever(process)

    monkeypatch.setattr(ForkProcess, "start", start_all_but_rank_1)
    assert ended(start(stops_when_asked)) == {0: 1}
    assert "a rank cannot be forked: Resource temporarily unavailable" in (tmp_path / "launcher.log").read_text()
