"""A real Slurm on this machine, for the time of a test module; and jobs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import needs

from uft_ds.host.files import user_cache

SCRIPT = Path(__file__).with_name("cluster.sh")
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
}


@dataclass(frozen=True)
class Cluster:
    """environment: with Slurm's commands in the path."""

    state: Path
    environment: dict[str, str]

    def run(self, *command: object, check: bool = True) -> str:
        """A command's output."""
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=self.environment, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *command: object, cwd: Path) -> str:
        """The number of a job that `sbatch --parsable` has taken."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, command)],
            capture_output=True, text=True, env=self.environment, cwd=cwd, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *, log: Path, seconds: float = 240) -> str:
        """The state in which a job has ended."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is {state}\n{_end_of(log)}"
            time.sleep(0.5)
        return state

    def until(self, holds: Callable[[], bool], *, log: Path, seconds: float = 240) -> None:
        """Wait for something that a job brings about."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"never\n{_end_of(log)}"
            time.sleep(0.05)

    def node(self, command: str, name: str) -> None:
        """kill-node, stop-node, start-node."""
        self.run(SCRIPT, command, name, "--state", self.state)


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:] if log.exists() else "no log"


@contextmanager
def cluster(state: Path, *, nodes: int, gpus: int) -> Iterator[Cluster]:
    """Bring one up, and end it by pid; the test is skipped where Debian's packages cannot be had."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",
        "SLURM_FIXTURE_DIR": str(state),
        "UFT_VENV": sys.prefix,
    }
    packages = user_cache().with_name("slurm-fixture")
    options = ["--state", str(state), "--cache", str(packages), "--nodes", str(nodes), "--gpus", str(gpus)]
    up = subprocess.run([SCRIPT, "up", *options], capture_output=True, text=True, timeout=300, check=False)
    if up.returncode != 0 and not (packages / "root" / ".complete").exists():
        needs.missing("Slurm", "apt-get must reach an index of Debian's packages", up.stderr)
    assert up.returncode == 0, up.stderr
    try:
        printed = subprocess.run(
            ["bash", "-c", f'eval "$({SCRIPT} env --state {state})" && env -0'],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        environment = dict(line.split("=", 1) for line in printed.stdout.split("\0") if "=" in line)
        yield Cluster(state, environment)
    finally:
        subprocess.run([SCRIPT, "down", "--purge", *options], capture_output=True, timeout=120, check=False)
        shutil.rmtree(state, ignore_errors=True)
