"""Standard streams as a command may find them: closed, full, in another encoding, of no width."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uft_ds.host.standard_streams import LastingOutput, drop_useless_size

SHOW = (sys.executable, "-m", "uft_ds", "recipe", "show", "quickstart")


def shown(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`uft recipe show` by a shell that redirects its output."""
    command = ["bash", "-c", f'"$@" {redirection}', "-", *SHOW]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 2, "error: standard output, or a file that was being written: No space left on device\n"),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(redirection: str, code: int, message: str) -> None:
    """A closed one was closed on purpose; a full one loses what was asked for, which is an error."""
    found = shown(redirection)
    assert (found.returncode, found.stdout, found.stderr) == (code, "", message)


def test_what_an_encoding_lacks_is_spelled_out() -> None:
    """The brackets around supervised tokens, in a locale of ISO-8859."""
    code = "from uft_ds.host.standard_streams import prepare_streams as p; p(); print('\\u27e6yes\\u27e7 \\xe9')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert found.stdout == b"\\u27e6yes\\u27e7 \xe9\n"


def test_bytes_that_are_no_letters_arrive() -> None:
    """Whoever reads the line says what is wrong with it; a strict stream would end the command in the middle."""
    code = "from uft_ds.host.standard_streams import prepare_streams as p; p(); print(ascii(input()))"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    given = b"caf\xe9\n"
    found = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True, env=environment)
    assert found.stdout == b"'caf\\udce9'\n"


def test_closed_streams_are_opened_for_children_too(tmp_path: Path) -> None:
    """Otherwise the first file that a child opens would take the number 1, and be printed into."""
    (tmp_path / "child.py").write_text("import os, sys; print(os.readlink('/proc/self/fd/1'), file=sys.stderr)")
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys; from uft_ds.host.standard_streams import prepare_streams; prepare_streams();"
        "subprocess.run([sys.executable, sys.argv[1]], check=True); print('lost')"
    )
    command = f"{sys.executable} {tmp_path}/parent.py {tmp_path}/child.py <&- >&-"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "/dev/null\n")


def test_a_small_output_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """It fits into a buffer, so only the end of the command finds it."""
    found = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m uft_ds --version >/dev/full"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert found.stderr.startswith("error: standard output")
    assert found.stderr.endswith("No space left on device\n")


@pytest.mark.parametrize(("given", "kept"), [("0", False), ("", False), ("-3", False), ("x", False), ("80", True)])
def test_a_width_of_nothing_is_dropped(given: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would print lines of no letters."""
    monkeypatch.setenv("COLUMNS", given)
    drop_useless_size()
    assert ("COLUMNS" in os.environ) == kept


def test_no_width_prints_everything() -> None:
    """As a pseudo terminal without a size hands it on."""
    code = "from uft_ds.commands.shared import console; console.print('held out')"
    environment = {**os.environ, "COLUMNS": "0"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == "held out\n"


def test_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    """`uft train | head`: the reader is gone, and what is printed is lost, without an error."""
    reader, writer = os.pipe()
    output = LastingOutput(os.fdopen(writer, "wb"), encoding="utf-8", line_buffering=True)
    output.write("step 1\n")
    assert os.read(reader, 100) == b"step 1\n"
    os.close(reader)
    for _ in range(2):
        assert output.write("step 2\n") == len("step 2\n")
    output.flush()
    with pytest.raises(BrokenPipeError):
        io.TextIOWrapper.flush(output)
    with pytest.raises(BrokenPipeError):
        output.close()
