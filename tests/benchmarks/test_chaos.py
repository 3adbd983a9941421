"""The judge of the soak: each kind of damage is seen, and what is no damage is not."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from chaos import Records, parsed
from chaos_checks import differing_checkpoint, leftovers, numbers, wrong_after_kill, wrong_merged, wrong_status
from chaos_faults import FAULTS
from chaos_processes import Hang, Start, kill, seconds_to_end, start, wait_for_exit, wait_until
from chaos_scenarios import TRAINED, Run, Unbroken

from uft_ds.host.locks import acquire

STEPS = [{"step": 1, "loss": 0.25, "seconds": 1.0, "grad_norm": 2.0}, {"step": 2, "loss": 0.2, "seconds": 1.0}]


def write_checkpoint(folder: Path, *, metrics_bytes: int, adapter: bytes = b"adapter") -> Path:
    """Not one that could be resumed: only what is compared."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(adapter)
    (folder / "trainer.json").write_text(json.dumps({"step": 2, "metrics_bytes": metrics_bytes}))
    hashes = {"trainer.json": {"sha256": str(metrics_bytes)}, "adapter/adapter_model.safetensors": {"sha256": "a"}}
    (folder / "manifest.json").write_text(json.dumps({"files": hashes}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Unbroken]:
    """A run that was killed after its second line, and the unbroken one."""
    pair = [Run(TRAINED[0], tmp_path / name, tmp_path / "data", tmp_path / "base") for name in ("killed", "unbroken")]
    for run in pair:
        run.output.mkdir(parents=True)
        (run.output / ".uft-run").touch()
        (run.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS))
    return pair[0], Unbroken(pair[1], {})


def run_python(code: str, log: Path) -> Start:
    return start([sys.executable, "-c", code], {}, log)


def test_a_process_that_outlives_its_command_is_found_and_ended(tmp_path: Path) -> None:
    """By its mark, though it is nobody's child any more."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    started = run_python(code, tmp_path / "log")
    assert wait_for_exit(started, 60.0) == 0
    with pytest.raises(Hang, match="alive 0 s after the command: worker"):
        seconds_to_end(started, 0.2)
    assert started.processes() == []


def test_a_start_that_hangs_is_ended(tmp_path: Path) -> None:
    """Neither its end nor the moment comes."""
    started = run_python("import time; time.sleep(600)", tmp_path / "log")
    with pytest.raises(Hang, match="the moment has not come"):
        wait_until(started, lambda: False, 0.2)
    assert started.process.wait(10) == -9


def test_a_kill_says_what_it_hit(tmp_path: Path) -> None:
    """Where there is no rank, the command itself; nothing once it has ended."""
    started = run_python("import time; time.sleep(600)", tmp_path / "log")
    # Its mark is in its environment, which on a busy machine is not to be read at once.
    wait_until(started, lambda: bool(started.processes()), 60.0)
    assert kill(started, "rank", random.Random(0)) == "parent"
    assert wait_for_exit(started, 10.0) == -9
    assert seconds_to_end(started, 10.0) < 10.0
    assert kill(started, "group", random.Random(0)) is None


def test_checkpoints_differ_by_their_bits_and_not_by_times(tmp_path: Path) -> None:
    """The size of metrics.jsonl depends on times; a file that is lacking, or has other bytes, is a difference."""
    ours = write_checkpoint(tmp_path / "ours" / "step-000002", metrics_bytes=90)
    same = write_checkpoint(tmp_path / "same" / "step-000002", metrics_bytes=91)
    other = write_checkpoint(tmp_path / "other" / "step-000002", metrics_bytes=90, adapter=b"adaptes")
    assert list(differing_checkpoint(ours, same)) == []
    (problem,) = differing_checkpoint(ours, other)
    assert problem == "step-000002/adapter/adapter_model.safetensors: not the bits of the unbroken run"
    (same / "trainer.json").unlink()
    assert any("in one of the two only" in problem for problem in differing_checkpoint(ours, same))


def test_metrics_are_the_beginning_of_the_unbroken_ones(runs: tuple[Run, Unbroken]) -> None:
    """Times may differ, a number may not, and no line may be torn."""
    run, unbroken = runs
    assert wrong_after_kill(run, unbroken, newest_before=-1) == []
    path = run.output / "metrics.jsonl"
    path.write_text(json.dumps(STEPS[0] | {"seconds": 9.0}) + "\n")
    assert numbers(run.output) == numbers(unbroken.run.output)[:1]
    assert wrong_after_kill(run, unbroken, newest_before=-1) == []
    path.write_text(json.dumps(STEPS[0] | {"loss": 0.26}) + "\n")
    assert wrong_after_kill(run, unbroken, -1) == ["metrics.jsonl: step 1: loss 0.26 instead of 0.25"]
    path.write_text(json.dumps(STEPS[0]) + '\n{"step": ')
    assert wrong_after_kill(run, unbroken, -1) == ["metrics.jsonl: the last line is torn"]


def test_a_lost_or_half_written_checkpoint_is_seen(runs: tuple[Run, Unbroken]) -> None:
    """One with a manifest that is not whole, and the loss of what had been saved before the start."""
    run, unbroken = runs
    write_checkpoint(run.output / "checkpoints" / "step-000002", metrics_bytes=90)
    half, lost = wrong_after_kill(run, unbroken, newest_before=2)
    assert half.startswith("step-000002 has a manifest and is not whole")
    assert lost == "the newest whole checkpoint is of step -1, before the start it was of step 2"
    (run.output / "checkpoints" / "step-000002" / "manifest.json").unlink()
    assert wrong_after_kill(run, unbroken, newest_before=-1) == [], "without a manifest nobody takes it as whole"


def test_a_lock_that_is_held_is_seen(runs: tuple[Run, Unbroken]) -> None:
    """As by an orphan."""
    run, unbroken = runs
    with acquire(run.output / ".uft-run"):
        assert "the lock is held" in wrong_after_kill(run, unbroken, -1)[0]
        assert any("the lock is held" in problem for problem in leftovers(run))
    assert leftovers(run) == []
    (run.output / ".metrics.tmp").touch()
    assert leftovers(run) == ["left behind: run/.metrics.tmp"]


def test_a_status_that_is_not_true_is_seen(runs: tuple[Run, Unbroken]) -> None:
    """A killed run is not done; who was killed is named; an older start's status counts until this one has begun."""
    run, _ = runs
    assert wrong_status(run, "group", time.time(), had_changed=True) == []
    status = run.output / "status.json"
    status.write_text(json.dumps({"exit_code": 1, "message": "rank 0 was killed (signal 9): out of memory?"}))
    assert wrong_status(run, "rank", time.time(), had_changed=True) == []
    assert wrong_status(run, "launcher", 0.0, had_changed=True) != []
    assert wrong_status(run, "launcher", time.time() + 60, had_changed=False) == []
    status.write_text(json.dumps({"exit_code": 0, "message": "done"}))
    assert any("exit code 0" in problem for problem in wrong_status(run, "worker", 0.0, had_changed=True))


def test_a_converted_model_is_compared_byte_by_byte(runs: tuple[Run, Unbroken]) -> None:
    """But for its card; and it may lack only while it is still to be made."""
    run, unbroken = runs
    for at, card in ((run, "killed"), (unbroken.run, "unbroken")):
        at.merged.mkdir()
        (at.merged / "model.safetensors").write_bytes(b"weights")
        (at.merged / "README.md").write_text(card)
    assert wrong_merged(run, unbroken, may_lack=False) == []
    (run.merged / "model.safetensors").write_bytes(b"weighta")
    assert wrong_merged(run, unbroken, may_lack=False) != []
    shutil.rmtree(run.merged)
    assert wrong_merged(run, unbroken, may_lack=True) == []
    assert wrong_merged(run, unbroken, may_lack=False) == ["no converted model"]


@pytest.mark.parametrize("name", ["vanished checkpoints", "vanished run", "file for checkpoints", "vanished data"])
def test_a_fault_mends_what_it_broke(runs: tuple[Run, Unbroken], name: str) -> None:
    """The files are away within the block and the same ones after it, whatever was made in their place."""
    run, _ = runs
    write_checkpoint(run.output / "checkpoints" / "step-000002", metrics_bytes=90)
    run.data.mkdir()
    (run.data / "rows.jsonl").touch()
    before = sorted(run.folder.parent.rglob("*"))
    with FAULTS[name](run, random.Random(0)):
        assert sorted(run.folder.parent.rglob("*")) != before
        if name == "vanished run":
            (run.output / "checkpoints").mkdir(parents=True)
    assert sorted(run.folder.parent.rglob("*")) == before


def test_a_soak_that_was_stopped_keeps_its_counts(tmp_path: Path) -> None:
    """Records are read again, in order."""
    records = Records(tmp_path / "records.jsonl")
    records.add(event="kill", kind="rank")
    records.add(event="wrong", problem="x")
    again = Records(tmp_path / "records.jsonl")
    assert [record["event"] for record in again.all] == ["kill", "wrong"]
    assert again.of("kill") == [{"event": "kill", "kind": "rank"}]
    assert parsed(["--continue"]).goes_on
