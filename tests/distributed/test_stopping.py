"""A run that is asked to stop saves its last finished step, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from ranks import free_port
from test_resume import adapter, numbers, ranks_of, recipe_in, wait_for_the_end_of
from test_training_run import TIMEOUT_SECONDS, uft, write_rows

from uft_ds.checkpoint.folder import newest_whole, step_of
from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from uft_ds.training.metrics import read_metrics

STEPS = 30
CHANGES = {"train__steps": STEPS, "train__checkpoint_every": 1000, "train__evaluate_every": 10}
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2", "--module")


def long_recipe(folder: Path, base: Path) -> Path:
    """No checkpoint falls on any step but the last; an evaluation takes many forwards."""
    recipe = recipe_in(folder, base, **CHANGES)
    rows = [{"prompt": f"Rate {i} again", "response": "no " * (1 + i % 3), "score": i % 3 / 2} for i in range(160)]
    write_rows(folder / "held_out.jsonl", rows)
    return recipe


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    result = uft("train", str(long_recipe(folder, tiny_qwen2)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


def heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
        preexec_fn=heed_interrupts,
    )


def end(process: subprocess.Popen[str], when: Callable[[], bool], ask: Callable[[], None]) -> str:
    """What a run says that is asked to stop when it is time, until it has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not when():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ask()
        return process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_run(folder: Path, step: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and any(line["step"] >= step and "grad_norm" in line for line in read_metrics(path))


def last_step(folder: Path) -> int:
    return max(line["step"] for line in read_metrics(folder / "metrics.jsonl") if "grad_norm" in line)


def assert_stopped_and_goes_on(folder: Path, recipe: Path, expected: Path) -> None:
    newest, problems = newest_whole(folder)
    assert newest is not None
    assert not problems
    assert step_of(newest) == last_step(folder) < STEPS, "the last finished step, which no period falls on"
    status = json.loads((folder / "status.json").read_text())
    assert status["exit_code"] == EXIT_STOPPED
    assert f"after step {step_of(newest)} of {STEPS}, which is saved" in status["message"]
    asked = uft("status", str(folder))
    assert asked.returncode == EXIT_STOPPED
    assert asked.stdout.strip() == f"step {step_of(newest)}, newest checkpoint {step_of(newest)}: {status['message']}"
    wait_for_the_end_of(folder)
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert numbers(folder) == numbers(expected)
    ours, theirs = adapter(folder), adapter(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert uft("status", str(folder)).stdout.strip() == f"step {STEPS}, newest checkpoint {STEPS}: done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Invariant 4: Ctrl-C and SIGTERM of `uft train` end in a checkpoint of the last finished step and exit code 85."""
    recipe, folder = long_recipe(tmp_path, tiny_qwen2), tmp_path / "run"
    process = start("uft_ds", "train", str(recipe))
    said = end(process, has_run(folder, 4), lambda: process.send_signal(number))
    assert process.returncode == EXIT_STOPPED, said
    assert "stopping: the step that is running is finished and saved first" in said
    assert "Traceback" not in said
    assert_stopped_and_goes_on(folder, recipe, unbroken)


def test_a_stop_during_an_evaluation_leaves_nothing_of_it(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """The signal comes once the step before an evaluation is reported; what had been learnt of the reference by then is
    forgotten, so that the evaluation after the restart gives the same bits."""
    recipe, folder = long_recipe(tmp_path, tiny_qwen2), tmp_path / "run"
    process = start("uft_ds", "train", str(recipe))

    def ask() -> None:
        time.sleep(0.05)  # into the evaluation, which takes ten times as long
        for rank in ranks_of(folder):
            os.kill(rank, signal.SIGUSR1)

    said = end(process, has_run(folder, 10), ask)
    assert process.returncode == EXIT_STOPPED, said
    evaluated = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "held_out/loss" in line]
    if last_step(folder) == 10:  # a very fast machine may have gone on
        assert evaluated == [0]
    assert_stopped_and_goes_on(folder, recipe, unbroken)


def test_a_second_interrupt_ends_it_at_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Exit code 130, no orphan, and the older checkpoint is still whole."""
    recipe, folder = recipe_in(tmp_path, tiny_qwen2, train__steps=100000, train__checkpoint_every=2), tmp_path / "run"
    process = start("uft_ds", "train", str(recipe))

    def ask() -> None:
        ranks = ranks_of(folder)
        assert len(ranks) == 2
        os.kill(ranks[0], signal.SIGSTOP)  # so that no step can end
        process.send_signal(signal.SIGINT)
        time.sleep(2.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)

    said = end(process, has_run(folder, 5), ask)
    assert process.returncode == EXIT_INTERRUPTED, said
    wait_for_the_end_of(folder)
    assert newest_whole(folder)[0] is not None


def test_a_fill_that_is_asked_to_stop_keeps_what_it_has(tiny_qwen2: Path, tmp_path: Path) -> None:
    """`uft reference`, again: it computes only the rest."""
    recipe = recipe_in(tmp_path, tiny_qwen2)
    rows = [{"prompt": f"Say {i}", "response": "yes " * (1 + i % 5)} for i in range(3000)]
    write_rows(tmp_path / "instruction.jsonl", rows)
    process = start("uft_ds", "reference", str(recipe))
    stored = tmp_path / "reference"
    said = end(process, lambda: any(stored.rglob("*.safetensors")), lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == EXIT_STOPPED, said
    assert "the same command goes on from there" in said
    again = uft("reference", str(recipe))
    assert again.returncode == 0, again.stderr
    known = int(again.stdout.rsplit(" distinct responses of ", 1)[1].split(": ")[1].split()[0])
    assert known >= 160


@pytest.mark.long
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("to", ["launcher", "one rank"])
def test_under_every_launcher(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path, launcher: tuple[str, ...], to: str
) -> None:
    """SIGTERM of the launcher, which passes it on and waits 30 seconds; SIGUSR1 of a single rank stops all."""
    recipe, folder = long_recipe(tmp_path, tiny_qwen2), tmp_path / "run"
    name, *options = launcher
    process = start(name, "--master_port", str(free_port()), *options, "uft_ds.train", str(recipe))

    def ask() -> None:
        if to == "one rank":
            os.kill(ranks_of(folder)[1], signal.SIGUSR1)
            return
        # The runner of DeepSpeed starts a launcher; a terminal, or Slurm, signals both.
        for child in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
            if "uft_ds.train" in child.cmdline() and child.pid not in ranks_of(folder):
                child.send_signal(signal.SIGTERM)

    said = end(process, has_run(folder, 4), ask)
    assert process.returncode != 0, said
    assert_stopped_and_goes_on(folder, recipe, unbroken)
