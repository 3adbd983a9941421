"""The proofs: real ranks, what they say when they fail, and that nothing of them stays."""

import time
from pathlib import Path

import pytest
import yaml

from uft_ds.doctor import proofs
from uft_ds.doctor.proofs import prove_all_reduce, prove_training

SECONDS = 240.0


def is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_failing_rank_is_shown_with_its_log(tmp_path: Path) -> None:
    """Rank 1 raises: its last words, under its number."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1': raise SystemError('broken cable')\ntime.sleep(300)\n"
    )
    finding = prove_all_reduce(tmp_path, seconds=SECONDS, program=(str(script),))
    assert finding.state == "problem"
    assert "ended with exit code 1" in finding.found
    said = finding.found.split("--- rank 1")[1].split("---")[0]
    assert "SystemError: broken cable" in said


@pytest.mark.long
def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    """After the time given launcher and ranks are gone."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).with_name(f'pid{os.getpid()}').touch()\n"
        "pathlib.Path(sys.argv[1]).with_name(f'pid{os.getppid()}').touch()\n"
        "time.sleep(300)\n"
    )
    finding = prove_all_reduce(tmp_path, seconds=25.0, program=(str(script),))
    assert finding.state == "problem"
    assert "not done after 25 s, stopped" in finding.found
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    assert len(pids) == 3, "launcher and two ranks had started"
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


@pytest.mark.long
def test_a_wrong_sum_is_no_proof(tmp_path: Path) -> None:
    """A rank that ends well but writes no result has proven nothing."""
    script = tmp_path / "rank.py"
    script.write_text("pass\n")
    assert prove_all_reduce(tmp_path, seconds=SECONDS, program=(str(script),)).state == "problem"


@pytest.mark.long
def test_a_run_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of `uft train` itself."""

    def without_model(folder: Path, *, has_gpus: bool) -> Path:
        recipe = write_toy(folder, has_gpus=has_gpus)
        tree = yaml.safe_load(recipe.read_text())
        tree["model"]["base"] = str(folder / "nowhere")
        recipe.write_text(yaml.safe_dump(tree))
        return recipe

    write_toy = proofs.write_toy
    monkeypatch.setattr(proofs, "write_toy", without_model)
    finding = prove_training(tmp_path, seconds=SECONDS)
    assert finding.state == "problem"
    assert "ended with exit code 2" in finding.found
    assert "model.base" in finding.found


def test_a_taken_port_is_told_before_any_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_PORT that is no port: nothing is launched."""
    monkeypatch.setenv("MASTER_PORT", "0")
    assert prove_all_reduce(tmp_path, seconds=1.0).remedy == "unset MASTER_PORT"
    assert list(tmp_path.iterdir()) == []
