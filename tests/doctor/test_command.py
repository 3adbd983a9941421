"""`uft doctor` as users and programs call it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import forked, program

from uft_ds.doctor import report
from uft_ds.doctor.finding import Finding
from uft_ds.errors import CheckFailed

TIMEOUT_SECONDS = 280
FINE = Finding("a", "ok", "fine")
ODD = Finding("b", "note", "odd [not markup]", "look")
BROKEN = Finding("c", "problem", "broken", "mend")


def doctor(cwd: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # The package may be found by a relative path: another folder is not to lose it.
    found = {"PYTHONPATH": str(Path(report.__file__).parents[2]), "COLUMNS": "200"}
    return forked("uft_ds", "doctor", *options, cwd=cwd, **found | environ)


@pytest.mark.long
def test_this_installation_is_proven_and_nothing_stays(tmp_path: Path) -> None:
    """Real ranks sum, a toy is trained: exit 0, JSON alone on stdout, folder, cache and home as they were."""
    cwd, home, cache = (tmp_path / name for name in ("cwd", "home", "cache"))
    for folder in (cwd, home, cache):
        folder.mkdir()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    result = doctor(cwd, "--json", PATH=path, HOME=str(home), XDG_CACHE_HOME=str(cache))
    assert result.returncode == 0, result.stdout + result.stderr
    findings = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert findings["2-rank all-reduce"]["state"] == "ok"
    assert "right on 2 ranks over gloo" in findings["2-rank all-reduce"]["found"]
    assert "loss 0.2500" in findings["1-step training"]["found"]
    assert set(findings["torch"]) == {"name", "state", "found", "remedy"}
    assert [list(folder.rglob("*")) for folder in (cwd, home, cache)] == [[], [], []]


def test_a_problem_is_exit_code_3(tmp_path: Path) -> None:
    """An output that cannot be written: in the table with its remedy, and in one line at the end."""
    result = doctor(tmp_path, "--quick", "--output", "/proc/nowhere")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "/proc cannot be written" in result.stdout
    assert "output folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert "all-reduce" not in result.stdout


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_leaves_nothing(tmp_path: Path, number: int) -> None:
    """Stopped while ranks start: they end, and so does the folder they wrote to."""
    process = program("uft_ds", "doctor", cwd=tmp_path, PYTHONPATH=str(Path(report.__file__).parents[2]))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while "checking: 2-rank all-reduce" not in "".join(process.said()):
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2.0)
        process.send_signal(number)
        said = "".join(process.communicate(timeout=60))
    finally:
        process.kill_group()
    assert process.returncode == 130, said
    assert list(tmp_path.iterdir()) == []


def shown(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *, as_json: bool) -> str:
    def examine(*_: Any, **__: Any) -> list[Finding]:
        return findings

    monkeypatch.setattr(report, "examine", examine)
    console = Console(width=120, markup=False, highlight=False)
    with console.capture() as captured:
        report.report_on(Path("runs"), console, as_json=as_json, quick=True, seconds=1.0)
    return captured.get()


def test_notes_are_no_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Told as they are, brackets included; counted at the end; JSON is nothing but JSON."""
    table = shown(monkeypatch, [FINE, ODD], as_json=False)
    assert "odd [not markup]" in table
    assert "no problem in 2 checks, 1 notes" in table
    capsys.readouterr()
    assert shown(monkeypatch, [FINE, ODD], as_json=True) == ""
    assert [entry["state"] for entry in json.loads(capsys.readouterr().out)] == ["ok", "note"]


def test_problems_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, after the table."""
    with pytest.raises(CheckFailed, match="1 of 3 checks found a problem: c"):
        shown(monkeypatch, [FINE, ODD, BROKEN], as_json=False)
