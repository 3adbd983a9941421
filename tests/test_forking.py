"""A forked program is to a test what an interpreter of its own would be."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import TIMEOUT_SECONDS, program, run

SAYING = """
import atexit, json, os, sys
atexit.register(print, "at exit")
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), os.environ.get("SHAPE"), __name__]))
print("to err", file=sys.stderr)
print(os.getpgid(0) == os.getpid())
sys.exit(7)
"""


def test_a_forked_program_is_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, folder, variables, streams, group, functions at exit and exit code: those of `python -m`."""
    (tmp_path / "saying.py").write_text(SAYING)
    monkeypatch.setenv("COLOUR", "red")
    process = program("saying", "a", "b c", cwd=tmp_path, SHAPE="round")
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    monkeypatch.chdir(tmp_path)
    expected = run(sys.executable, "-m", "saying", "a", "b c", SHAPE="round")
    assert process.returncode == expected.returncode == 7
    assert (out, err) == (expected.stdout, expected.stderr)
    assert "red" in out
    assert "at exit" in out


@pytest.mark.parametrize(("ends", "code"), [("raise ValueError", 1), ("sys.exit('said')", 1), ("pass", 0)])
def test_exit_codes_are_those_of_the_interpreter(tmp_path: Path, ends: str, code: int) -> None:
    """An error shows its traceback."""
    (tmp_path / "ending.py").write_text(f"import sys\n{ends}\n")
    process = program("ending", cwd=tmp_path)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code
    assert ("Traceback" in err) == ("ValueError" in ends)
    assert ("said" in err) == ("said" in ends)


def test_a_forked_program_heeds_interrupts(tmp_path: Path) -> None:
    """Also where tests run in the background of a shell, whose jobs ignore SIGINT, and so would an interpreter."""
    (tmp_path / "asking.py").write_text(
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    assert program("asking", cwd=tmp_path).communicate(timeout=TIMEOUT_SECONDS)[0] == "True\n"


def test_a_program_is_ended_with_its_group(tmp_path: Path) -> None:
    """By SIGKILL, which is its exit code; a process that it has started goes too."""
    (tmp_path / "lasting.py").write_text(
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = program("lasting", cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    while not process.said()[0].endswith("\n"):
        assert process.poll() is None, process.said()
    process.kill_group()
    assert process.returncode == -signal.SIGKILL
    child = int(process.said()[0])
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_forked_program_imports_nothing_heavy(tmp_path: Path) -> None:
    """What takes seconds is there; the command itself is not, so that it is imported as always."""
    names = ("torch", "transformers", "peft", "deepspeed", "uft_ds.run.rank", "matplotlib", "uft_ds.cli")
    (tmp_path / "listing.py").write_text(f"import sys\nprint([name in sys.modules for name in {names}])\n")
    process = program("listing", cwd=tmp_path)
    assert process.communicate(timeout=TIMEOUT_SECONDS)[0].strip() == str([True] * 6 + [False])


def test_a_forked_program_computes_with_as_many_threads(tmp_path: Path) -> None:
    """Else sums have other bits, and a run by a launcher differs from the same run by a forked command."""
    (tmp_path / "counting.py").write_text("import torch\nprint(torch.get_num_threads())\n")
    forked, _ = program("counting", cwd=tmp_path).communicate(timeout=TIMEOUT_SECONDS)
    assert forked == run(sys.executable, str(tmp_path / "counting.py")).stdout == "1\n"
