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
from typing import Any

import psutil
import pytest
import torch
from engines import engine_of
from forking import Program
from ranks import run_on_ranks
from runs import (
    TIMEOUT_SECONDS,
    adapter,
    numbers,
    program,
    ranks_of,
    recipe_in,
    run,
    started,
    uft,
    wait_for_the_end_of,
    write_rows,
)
from toy import UFT, toy_step

from uft_ds.checkpoint.folder import newest_whole, step_of
from uft_ds.data.mixture import Step
from uft_ds.errors import EXIT_CRASHED, EXIT_INTERRUPTED, EXIT_STOPPED, Stopped
from uft_ds.host.ports import free_port
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.known.cache import Known, fill
from uft_ds.record.metrics_file import read_metrics
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method

STEPS = 16
CHANGES = {
    "train__steps": STEPS,
    "train__checkpoint_every": 1000,
    "train__evaluate_every": 10,
    "train__tokens_per_micro_batch": 256,
}
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2", "--module")


def long_recipe(folder: Path, base: Path) -> Path:
    """No checkpoint falls on any step but the last."""
    return recipe_in(folder, base, **CHANGES)


def recipe_that_evaluates(folder: Path, base: Path) -> Path:
    """Its evaluations take many forwards."""
    recipe = recipe_in(folder, base, **CHANGES | {"train__tokens_per_micro_batch": 64})
    rows = [{"prompt": f"Rate {i} again", "response": "no " * (1 + i % 3), "score": i % 3 / 2} for i in range(120)]
    write_rows(folder / "held_out.jsonl", rows)
    return recipe


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    result = uft("train", str(long_recipe(folder, tiny_qwen2)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


class Launcher(subprocess.Popen[str]):
    """`python -m COMMAND` in an interpreter of its own, used as a `Program`."""

    def __init__(self, *command: str) -> None:
        super().__init__(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
        )

    def said(self) -> tuple[str, str | None]:
        """Once it has ended."""
        return self.communicate()

    def kill_group(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def end(process: Program | Launcher, when: Callable[[], bool], ask: Callable[[], None]) -> str:
    """What a run says that is asked to stop when it is time, until it has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not when():
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ask()
        return "".join(filter(None, process.communicate(timeout=60)))
    finally:
        process.kill_group()


def has_run(folder: Path, step: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and any(line["step"] >= step and "grad_norm" in line for line in read_metrics(path))


def last_step(folder: Path) -> int:
    return max(line["step"] for line in read_metrics(folder / "metrics.jsonl") if "grad_norm" in line)


def goes_on(recipe: Path) -> subprocess.CompletedProcess[str]:
    return uft("train", str(recipe), "--resume")


def assert_stopped_and_goes_on(
    folder: Path, recipe: Path, expected: Path, again: Callable[[Path], subprocess.CompletedProcess[str]] = goes_on
) -> None:
    newest, problems = newest_whole(folder)
    assert newest is not None
    assert not problems
    assert step_of(newest) == last_step(folder) < STEPS, "the last finished step, which no period falls on"
    status = json.loads((folder / "status.json").read_text())
    assert status["exit_code"] == EXIT_STOPPED
    assert f"after step {step_of(newest)} of {STEPS}, which is saved" in status["message"]
    asked = uft("status", str(folder))
    assert asked.returncode == EXIT_STOPPED
    assert (
        asked.stdout.strip()
        == f"step {step_of(newest)}, newest checkpoint: step {step_of(newest)}; {status['message']}"
    )
    wait_for_the_end_of(folder)
    result = again(recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resuming from {newest.name}" in result.stdout
    assert numbers(folder) == numbers(expected)
    ours, theirs = adapter(folder), adapter(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert uft("status", str(folder)).stdout.strip() == f"step {STEPS}, newest checkpoint: step {STEPS}; done"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Invariant 4: Ctrl-C and SIGTERM of `uft train` end in a checkpoint of the last finished step and exit code 85."""
    recipe, folder = long_recipe(tmp_path, tiny_qwen2), tmp_path / "run"
    process = started(recipe)
    said = end(process, has_run(folder, 4), lambda: process.send_signal(number))
    assert process.returncode == EXIT_STOPPED, said
    assert "stopping: the step that is running is finished and saved first" in said
    assert f"stopped by {number.name} after step" in said
    assert "Traceback" not in said
    assert_stopped_and_goes_on(folder, recipe, unbroken)


@pytest.mark.long
def test_a_stop_during_an_evaluation_leaves_nothing_of_it(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The signal comes once the step before an evaluation is reported; what had been learnt of the reference by then is
    forgotten, so that the evaluation after the restart gives the same bits."""
    straight = recipe_that_evaluates(tmp_path / "straight", tiny_qwen2)
    assert uft("train", str(straight)).returncode == 0
    recipe, folder = recipe_that_evaluates(tmp_path / "stopped", tiny_qwen2), tmp_path / "stopped" / "run"
    process = started(recipe)

    def ask() -> None:
        ranks = ranks_of(folder)
        time.sleep(0.05)  # into the evaluation, which takes many times as long
        for number in (signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT):
            for rank in ranks:
                os.kill(rank, number)

    said = end(process, has_run(folder, 10), ask)
    assert process.returncode == EXIT_STOPPED, said
    evaluated = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "held_out/loss" in line]
    assert last_step(folder) == 10, "the next step was not begun"
    assert evaluated == [0]
    assert_stopped_and_goes_on(folder, recipe, straight.parent / "run")


def test_a_stop_before_the_first_step_is_one(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Ctrl-C while the ranks load: 85, said as what it was, also by `uft status`."""
    recipe, folder = recipe_in(tmp_path, tiny_qwen2, train__steps=100000), tmp_path / "run"
    process = started(recipe)
    said = end(process, lambda: len(ranks_of(folder)) == 2, lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == EXIT_STOPPED, said
    assert "nothing is lost" in said
    assert "SIGUSR1" not in said
    asked = uft("status", str(folder))
    assert asked.returncode == EXIT_STOPPED
    assert "before it trained" in asked.stdout


@pytest.mark.long
def test_a_second_interrupt_ends_it_at_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Exit code 130, no orphan, and the older checkpoint is still whole."""
    recipe, folder = recipe_in(tmp_path, tiny_qwen2, train__steps=100000, train__checkpoint_every=2), tmp_path / "run"
    process = started(recipe)

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


@pytest.mark.long
def test_a_rank_that_dies_while_it_stops_is_no_stop(tiny_qwen2: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGABRT of a rank, as NCCL's watchdog does: a crash, not "nothing is lost"."""
    recipe, folder = (
        recipe_in(tmp_path, tiny_qwen2, train__steps=100000, train__checkpoint_every=1000),
        tmp_path / "run",
    )
    process = started(recipe)

    def ask() -> None:
        ranks = ranks_of(folder)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        os.kill(ranks[1], signal.SIGABRT)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)

    said = end(process, has_run(folder, 3), ask)
    assert process.returncode == EXIT_CRASHED, said
    assert "was killed (signal 6)" in said


@pytest.mark.long
def test_a_fill_that_is_asked_to_stop_keeps_what_it_has(tiny_qwen2: Path, tmp_path: Path) -> None:
    """`uft reference`, again: it computes only the rest."""
    recipe = recipe_in(tmp_path, tiny_qwen2)
    rows = [{"prompt": f"Say {i}", "response": "yes " * (1 + i % 5)} for i in range(1200)]
    write_rows(tmp_path / "instruction.jsonl", rows)
    process = program("uft_ds", "reference", str(recipe))
    stored = tmp_path / "reference"
    said = end(process, lambda: any(stored.rglob("*.safetensors")), lambda: process.send_signal(signal.SIGINT))
    assert process.returncode == EXIT_STOPPED, said
    assert "the same command continues from there" in said
    again = uft("reference", str(recipe))
    assert again.returncode == 0, again.stderr
    known = int(again.stdout.rsplit(" distinct responses of ", 1)[1].split(": ")[1].split()[0])
    assert known >= 160


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "to"),
    [(TORCHRUN, "launcher"), (DEEPSPEED, "launcher"), (DEEPSPEED, "one rank")],
    ids=["torchrun", "deepspeed", "deepspeed, one rank"],
)
def test_under_every_launcher(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path, launcher: tuple[str, ...], to: str
) -> None:
    """SIGTERM of the launcher, which passes it on and waits 30 seconds; SIGUSR1 of a single rank stops all.

    The launcher starts and resumes the run, also where `latest` is gone, and has the numbers of `uft train`.
    """
    recipe, folder = long_recipe(tmp_path, tiny_qwen2), tmp_path / "run"
    name, *options = launcher

    def command(*arguments: str) -> tuple[str, ...]:
        return (name, "--master_port", str(free_port()), *options, "uft_ds.train", str(recipe), *arguments)

    def by_launcher(recipe: Path) -> subprocess.CompletedProcess[str]:
        (folder / "latest").unlink()
        return run(sys.executable, "-m", *command("--resume"))

    process = Launcher(*command())

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
    assert_stopped_and_goes_on(folder, recipe, unbroken, goes_on if to == "one rank" else by_launcher)
    if launcher == TORCHRUN:
        again = run(sys.executable, "-m", *command("--resume"))
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"{folder} is done: there is nothing to resume" in again.stdout


def an_evaluation_that_is_stopped(base: Path, at_group: int) -> Any:
    """At its so-manieth check: how many groups were evaluated, and whether the cache knows what it knew."""
    engine = engine_of(base)
    cache, groups = Known.of_reference("cached", identity="0" * 64), [toy_step(3, seed=seed) for seed in range(5)]
    visit = engine.micro_batches
    visited: list[int] = []

    def counted(step: Step, tokens: int) -> Any:
        visited.append(step.index)
        return visit(step, tokens)

    engine.micro_batches = counted  # type: ignore[method-assign]
    checks = iter(range(len(groups)))
    stop = Stop(StopRequest(), lambda own: signal.SIGTERM if next(checks) == at_group else 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        evaluate(Method(engine, UFT, cache, 64), groups, stop=stop)
    return len(visited), cache.num_known


def test_an_evaluation_stops_between_two_groups(tiny_qwen2: Path) -> None:
    """Not at its end; and what had been learnt is forgotten."""
    assert run_on_ranks(an_evaluation_that_is_stopped, 1, tiny_qwen2, 3)[0] == (3, 0)


def a_fill_that_is_stopped(base: Path) -> Any:
    engine = engine_of(base)
    cache, groups = Known.of_reference("cached", identity="0" * 64), [toy_step(3, seed=seed) for seed in range(5)]
    checks = iter(range(len(groups)))
    stop = Stop(StopRequest(), lambda own: signal.SIGTERM if next(checks) == 1 else 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        fill(engine, cache, groups, 64, flush_every=100, stop=stop)
    return cache.num_known, [len(group.responses) for group in groups]


def test_a_fill_stops_between_two_groups(tiny_qwen2: Path) -> None:
    """And keeps what it has found."""
    known, sizes = run_on_ranks(a_fill_that_is_stopped, 1, tiny_qwen2)[0]
    assert known == sum(sizes[:2])
