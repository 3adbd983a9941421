"""The cluster that the tests of jobs start: its packages, without a network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).with_name("cluster.sh")
APT_GET = """#!/bin/sh
mkdir "$BUSY" || echo two >>"$CALLS"
sleep 0.2
echo call >>"$CALLS"
case "$*" in *download*) touch one.deb ;; esac
rmdir "$BUSY"
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr/sbin"
"""


def test_two_clusters_that_start_at_once_fetch_the_packages_once(tmp_path: Path) -> None:
    """Each waits for the other's apt-get. Both end without a cluster here, because the packages are empty."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    for name, text in (("apt-get", APT_GET), ("dpkg", DPKG)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "BUSY": str(tmp_path / "busy"),
        "CALLS": str(calls),
        "SLURM_FIXTURE_CACHE": str(tmp_path / "cache"),
    }
    started = [
        subprocess.Popen(
            [SCRIPT, "up", "--state", str(tmp_path / name)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert sum("fetching Debian's Slurm" in text for text in said) == 1
    assert calls.read_text().split() == ["call"] * 3  # update, the list, download
    assert (tmp_path / "cache" / "root" / ".complete").exists()
