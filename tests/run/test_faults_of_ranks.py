"""How a rank ends that meets an error of a file: the file is named; exit code 2 if a restart meets the error again."""

import errno
import json
from pathlib import Path

import pytest

from uft_ds.host.signals import StopRequest
from uft_ds.run import rank

RECIPE = """name: t
model: {base: nowhere}
data: {sources: [{format: jsonl, path: a.jsonl}]}
deepspeed: zero3_cpu
output: out
"""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of the only rank of a run; returns the file of its outcome."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(RECIPE)
    of_launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    for name, value in (of_launcher | {rank.OUTCOME: str(tmp_path / "outcome.json")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "outcome.json"


def failing_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, "of the system", "a/file")

    monkeypatch.setattr(rank, "init_distributed", fails)


def test_a_lasting_fault_is_bad_input(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a command: no restart, no traceback, one line that names the file."""
    failing_with(errno.ENOSPC, monkeypatch)
    assert rank.main(StopRequest(), ["t.yaml"]) == 2
    assert capsys.readouterr().err == "error: rank 0: a/file: of the system\n"
    assert json.loads(alone.read_text()) == {"exit_code": 2, "message": "a/file: of the system"}


def test_a_passing_fault_is_a_crash(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's script starts the job again."""
    failing_with(errno.ESTALE, monkeypatch)
    with pytest.raises(OSError, match="of the system"):
        rank.main(StopRequest(), ["t.yaml"])
    assert json.loads(alone.read_text())["exit_code"] == 1
