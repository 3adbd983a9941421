"""What commands import: each in a process of its own, forked from one interpreter that has imported `uft_ds.cli` alone.

An interpreter for each would cost a second of start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_FORKING = """
import json, os, sys
from uft_ds.cli import main
commands, names, folder = json.loads(sys.argv[1])

def run(words):
    code, sys.argv = 0, ["uft", *words]
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    return [code, [name for name in names if name in sys.modules]]

for number, words in enumerate(commands):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        found = run(words)
        sys.stdout.flush()
        sys.stderr.flush()
        with open(f"{folder}/{number}.json", "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended. imported: those of the names that were asked for."""

    code: int
    imported: list[str]
    out: str
    err: str


def ended(commands: Sequence[Sequence[str]], names: Collection[str], folder: Path) -> list[Ended]:
    """Run each of `uft COMMAND`; folder: an empty one, for what they write to their streams."""
    given = json.dumps([list(map(list, commands)), list(names), str(folder)])
    command = [sys.executable, "-c", _FORKING, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = []
    for number in range(len(commands)):
        out, err = ((folder / f"{number}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        result = folder / f"{number}.json"
        assert result.exists(), out + err
        found.append(Ended(*json.loads(result.read_text()), out, err))
    return found
