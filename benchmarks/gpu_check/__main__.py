"""Run the stages: `python -m gpu_check FOLDER [--budget 600] [--only STAGE ...] [--cpu]`.

Each stage is a process of its own with a time of its own; one that fails, crashes or has no time left does not stop the
others. FOLDER gets `gpu_check.json`, complete after each stage, `gpu_check.md` and `log.txt`; the rest is put in a
temporary folder and removed. Exit code 0: all stages hold; 1: not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gpu_check.table import markdown

BUDGET = 600.0
"""Seconds for all stages together."""
SPARE = 0.025
"""The share of the budget that no stage gets: for ending one that does not want to end, and for the results."""
GRACE = 5.0
"""Seconds from the request to end until a stage is killed."""


@dataclass(frozen=True)
class Stage:
    """name: the module, and after a colon what it is told. seconds: its share of the default budget."""

    name: str
    seconds: float


STAGES = (
    Stage("environment", 30),
    Stage("kernels", 70),
    Stage("exactness", 50),
    Stage("waits", 50),
    Stage("live_reference", 30),
    Stage("attention", 50),
    Stage("speed:true", 90),
    Stage("quickstart", 80),
    Stage("speed:selective", 80),
    Stage("against_trl_here", 70),
)
"""Cheap and valuable ones first."""


@dataclass
class Outcome:
    """What is known of a stage. how: passed, failed, timed out, crashed, or left out."""

    stage: str
    how: str
    seconds: float
    allowed_seconds: float
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Log:
    """Lines for the terminal and the log, each with the seconds since the start."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.started = file, time.monotonic()

    def say(self, text: str, *, shown: bool = True) -> None:
        line = f"[{time.monotonic() - self.started:5.1f} s] {text}"
        self.file.write(line + "\n")
        self.file.flush()
        if shown:
            print(line, flush=True)


def main(arguments: Seq[str] | None = None, stages: Seq[Stage] = STAGES) -> int:
    """Run the stages and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages (default: %(default)g)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=", ".join(stage.name for stage in stages))
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the budget that are gone (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="toy sizes, on a CPU: a test of this kit")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget: {options.budget:g} given, expected seconds above 0")
    unknown = set(options.only or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(s.name for s in stages)}")
    chosen = [stage for stage in stages if options.only is None or stage.name in options.only]
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with (options.folder / "log.txt").open("w", encoding="utf-8") as file:
        log = Log(file)
        end = log.started + options.budget * (1 - SPARE) - options.spent
        scale = max(0.0, end - log.started) / sum(stage.seconds for stage in chosen)
        for number, stage in enumerate(chosen):
            # What a stage leaves of its time is the next one's, as long as those after it have theirs.
            later = sum(other.seconds for other in chosen[number + 1 :]) * scale
            allowed = max(stage.seconds * scale, end - time.monotonic() - later)
            outcomes.append(run_stage(stage, min(allowed, end - time.monotonic()), log, cpu=options.cpu))
            write_results(options.folder, outcomes, log, to_come=len(chosen) - number - 1)
    passed = all(outcome.how == "passed" for outcome in outcomes)
    others = ", ".join(f"{outcome.stage} {outcome.how}" for outcome in outcomes if outcome.how != "passed")
    print(f"{'PASSED' if passed else f'FAILED ({others})'}: results in {options.folder / 'gpu_check.md'}", flush=True)
    return 0 if passed else 1


def run_stage(stage: Stage, allowed: float, log: Log, *, cpu: bool) -> Outcome:
    """Run a stage in a process of its own, and end it and all of its children when its time is up."""
    if allowed < 1:
        log.say(f"{stage.name}: left out, no time is left")
        return Outcome(stage.name, "left out", 0.0, max(0.0, allowed))
    log.say(f"{stage.name}: at most {allowed:.0f} s")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as name:
        out = Path(name) / "report.json"
        process = subprocess.Popen(
            command_of(stage, out, allowed, cpu=cpu),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_read, args=(process, log), daemon=True)
        reader.start()
        timed_out = False
        try:
            code = process.wait(timeout=allowed)
        except subprocess.TimeoutExpired:
            timed_out = True
            code = _end(process)
        except BaseException:
            _end(process)
            raise
        reader.join(timeout=2.0)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
        seconds = time.monotonic() - started
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {"finished": False, "problems": [], "facts": {}, "tables": {}}
    outcome = Outcome(stage.name, "passed", seconds, allowed, found["problems"], found["facts"], found["tables"])
    if timed_out:
        outcome.how = "timed out"
        outcome.problems.append(f"not done after {allowed:.0f} s; what it had found is kept")
    elif not found["finished"]:
        outcome.how = "crashed"
        outcome.problems.append(f"ended with exit code {code} before its end; see log.txt")
    elif outcome.problems:
        outcome.how = "failed"
    log.say(f"{stage.name}: {outcome.how} in {seconds:.1f} s")
    return outcome


def command_of(stage: Stage, out: Path, allowed: float, *, cpu: bool) -> list[str]:
    """The command of a stage, which writes its report to `out` and its other files beside it."""
    command = [sys.executable, "-u", "-m", "gpu_check.stage", stage.name, "--out", str(out)]
    return [*command, "--work", str(out.parent), "--seconds", f"{allowed:.1f}", *(["--cpu"] if cpu else [])]


def _read(process: subprocess.Popen[str], log: Log) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.say(f"    {line.rstrip()}", shown="PROBLEM" in line)


def _end(process: subprocess.Popen[str]) -> int:
    """Ask the process and its children to end, then kill what is left of them."""
    for sign, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that have ignored the request
    return process.wait(timeout=GRACE)


def write_results(folder: Path, outcomes: list[Outcome], log: Log, *, to_come: int) -> None:
    """Both files, complete at any moment. Nothing has passed while stages are to come: the run may yet be ended."""
    values = {
        "passed": to_come == 0 and all(outcome.how == "passed" for outcome in outcomes),
        "stages_to_come": to_come,
        "seconds": time.monotonic() - log.started,
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    for name, text in (("gpu_check.json", json.dumps(values, indent=1) + "\n"), ("gpu_check.md", markdown(values))):
        new = folder / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(folder / name)


if __name__ == "__main__":
    # An exception, so that the stage that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
