"""The shell that keeps a job's server, without Slurm: a small program stands for vLLM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from uft_ds.host.ports import free_port

SLURM = Path(__file__).parents[2] / "slurm"
SECONDS = 60.0

PROGRAM = """
import http.server, os, subprocess, sys
assert sys.argv[1:3] == ["serve", "model"], sys.argv
print("environment", os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], os.environ.get("VLLM_API_KEY"), flush=True)
print("unset", os.environ.get("PYTHONPATH"), os.environ.get("MASTER_PORT"), flush=True)
if "--unknown" in sys.argv:
    sys.exit("error: unrecognized arguments: --unknown")
worker = subprocess.Popen(["sleep", "600"])
print("worker", worker.pid, "of", os.getpid(), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" and "--sick" not in sys.argv else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

SHELL = """
. "$1/server.sh" || exit 2
_come_back() { echo "come back $1"; return "$1"; }
_listen
_find_vllm || exit 2
_server_host=127.0.0.1 _server_port=$2 _server_key=$3
_server_words=(model --port "$2" ${UFT_VLLM_FLAGS:-})
for start in $(seq "${STARTS:-1}"); do
    _start_server
    code=$?
done
[ "$code" = 0 ] || exit "$code"
while [ "$_asked" = 0 ] && [ ! -e stop ]; do sleep 0.1; done
echo "asked $_asked"
_end_server
"""


@contextmanager
def keeping(folder: Path, key: str = "None", **settings: str) -> Iterator[subprocess.Popen[str]]:
    """A batch shell, until it has come to its end; its output is in the file `out`."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {
        **os.environ, "UFT_VLLM": f"{sys.executable} {folder / 'program.py'}", "PYTHONPATH": "/of/the/ranks",
        "MASTER_PORT": "1", **settings,
    }  # fmt: skip
    with (folder / "out").open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-uc", SHELL, "bash", SLURM, str(free_port()), key],
            cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        yield shell
    finally:
        (folder / "stop").touch()
        try:
            shell.wait(SECONDS)
        finally:
            shell.kill()
            left = servers(folder)
            for pid in left:
                psutil.Process(pid).kill()
            assert not left


def log_of(folder: Path) -> str:
    return (folder / "uft-vllm-.log").read_text() if (folder / "uft-vllm-.log").exists() else ""


def started(folder: Path) -> list[tuple[int, int]]:
    """(worker, server) of every start."""
    return [(int(worker), int(server)) for worker, server in re.findall(r"worker (\d+) of (\d+)", log_of(folder))]


def servers(folder: Path) -> set[int]:
    """What still runs of servers and their workers."""
    workers = {worker for worker, _ in started(folder)}
    found = set()
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        is_one = "serve" in words and any(word.startswith(f"{folder}/") for word in words)
        if (is_one or process.pid in workers) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return found


def until(holds: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, (folder / "out").read_text() + log_of(folder)
        time.sleep(0.05)


def said(folder: Path) -> str:
    return (folder / "out").read_text()


@pytest.mark.long
def test_a_server_that_ends_is_started_again(tmp_path: Path) -> None:
    """With its workers ended; at the end nothing is left of it, and no file but its log."""
    with keeping(tmp_path, key="MY_KEY", MY_KEY="secret") as shell:
        until(lambda: "the server is ready" in said(tmp_path), tmp_path)
        os.kill(started(tmp_path)[0][1], signal.SIGKILL)
        until(lambda: len(started(tmp_path)) == 2, tmp_path)
        assert servers(tmp_path) == set(started(tmp_path)[1])
        assert shell.poll() is None
    assert shell.returncode == 0
    assert "the server has ended with exit code 137; restart 1 of 5" in said(tmp_path)
    assert "asked 0" in said(tmp_path)
    assert servers(tmp_path) == set()
    assert log_of(tmp_path).count("environment True secret\nunset None None\n") == 2
    assert "secret" not in said(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "program.py", "stop", "uft-vllm-.log"]


@pytest.mark.long
def test_a_server_that_ends_too_often_ends_the_run(tmp_path: Path) -> None:
    """The batch shell is signalled as before the time limit: the run saves."""
    with keeping(tmp_path, UFT_VLLM_RESTARTS="0") as shell:
        until(lambda: "the server is ready" in said(tmp_path), tmp_path)
        os.kill(started(tmp_path)[0][1], signal.SIGKILL)
        shell.wait(SECONDS)
    assert "exit code 137 after 0 restarts (UFT_VLLM_RESTARTS): the run is ended" in said(tmp_path)
    assert "asked 1" in said(tmp_path)
    assert servers(tmp_path) == set()


def test_a_server_that_cannot_start_is_shown(tmp_path: Path) -> None:
    """Its last words are in the job's log; it is not started again."""
    with keeping(tmp_path, UFT_VLLM_FLAGS="--unknown") as shell:
        shell.wait(SECONDS)
    assert shell.returncode == 1
    assert "server: error: unrecognized arguments: --unknown" in said(tmp_path)
    assert "=== the server has ended before it was ready" in said(tmp_path)
    assert log_of(tmp_path).count("environment") == 1


@pytest.mark.long
def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    """After UFT_VLLM_MINUTES, here none: at whatever moment of its start that is, no process of it stays."""
    with keeping(tmp_path, UFT_VLLM_FLAGS="--sick", UFT_VLLM_MINUTES="0", STARTS="12") as shell:
        shell.wait(SECONDS)
    assert shell.returncode == 1
    assert "=== the server is not ready after 0 minutes (UFT_VLLM_MINUTES)" in said(tmp_path)
    time.sleep(1)  # one that was missed would have begun by now
    assert servers(tmp_path) == set()


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_does_not_wait_for_its_server(tmp_path: Path) -> None:
    """USR1 while the server starts: it is ended, and the job comes back."""
    with keeping(tmp_path, UFT_VLLM_FLAGS="--sick") as shell:
        until(lambda: bool(started(tmp_path)), tmp_path)
        os.kill(shell.pid, signal.SIGUSR1)
        shell.wait(SECONDS)
    assert shell.returncode == 85
    assert "come back 85" in said(tmp_path)
    assert servers(tmp_path) == set()


@pytest.mark.parametrize(
    ("vllm", "message"),
    [("", "UFT_VLLM is not given"), ("no-such-program --x", "no-such-program is no program")],
)
def test_no_server_can_be_found(tmp_path: Path, vllm: str, message: str) -> None:
    """Exit code 2, before anything is started."""
    with keeping(tmp_path, UFT_VLLM=vllm) as shell:
        shell.wait(SECONDS)
    assert shell.returncode == 2
    assert message in said(tmp_path)


@pytest.mark.long
def test_a_virtual_environment_names_its_server(tmp_path: Path) -> None:
    """UFT_VLLM as a folder."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program = tmp_path / "venv" / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    with keeping(tmp_path, UFT_VLLM=str(tmp_path / "venv")):
        until(lambda: "the server is ready" in said(tmp_path), tmp_path)
    assert servers(tmp_path) == set()
