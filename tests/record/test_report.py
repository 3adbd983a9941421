"""What a user sees of a run off a terminal."""

import io
import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from uft_ds.record.metrics_file import MetricsWriter, read_metrics
from uft_ds.record.report import ConsoleReporter, one_line


def test_the_time_left_is_by_the_steps_of_this_start(tmp_path: Path) -> None:
    """A run that goes on at step 99 of 109: one step of 2 s was made here, 9 are left, 18 s."""
    console = Console(file=io.StringIO(), width=200)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={}, after_step=99)
    with ConsoleReporter(console, writer, 109) as reporter:
        reporter._last_line -= 60  # a line is due
        reporter.step(100, {"seconds": 2.0, "loss": 0.25, "tokens_per_second": 1.0})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().startswith("step 100/109  loss 0.2500")
    assert console.file.getvalue().endswith("ETA 0:18\n")


def test_short_steps_have_no_line_of_their_own_off_a_terminal(tmp_path: Path) -> None:
    """The first, the last and one after five seconds, as docs/running.md says; metrics.jsonl has all five."""
    console = Console(file=io.StringIO(), width=200)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={})
    with ConsoleReporter(console, writer, 5) as reporter:
        for step in range(1, 6):
            reporter._last_line -= 6.0 if step == 3 else 0.0
            reporter.step(step, {"seconds": 0.1, "loss": 0.25, "tokens_per_second": 1.0})
    assert isinstance(console.file, io.StringIO)
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == ["1/5", "3/5", "5/5"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_what_is_undefined_is_null_and_ends_no_line(tmp_path: Path) -> None:
    """As every correlation before the first step; TensorBoard is told, too, and says nothing."""
    console = Console(file=io.StringIO(), width=200)
    writer = MetricsWriter(tmp_path, ("tensorboard",), run_name="test", config={})
    metrics = {"loss": 0.25, "rank_correlation/score": math.nan, "implicit_reward/score": math.nan}
    with ConsoleReporter(console, writer, 109) as reporter:
        reporter.held_out(0, {f"held_out/{name}": value for name, value in metrics.items()})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["held_out/rank_correlation/score"] is None
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "held out, step 0:  loss 0.2500  reward: score +nan\n"


def test_a_bar_knows_the_time_left_after_one_step(tmp_path: Path) -> None:
    """On a terminal, with steps of 2 minutes: rich itself looks at the last 30 s, and would never know."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={})
    with ConsoleReporter(console, writer, 3) as reporter:
        reporter.step(1, {"seconds": 120.0, "loss": 0.25, "tokens_per_second": 1.0})
        reporter._progress.refresh()
    assert isinstance(console.file, io.StringIO)
    assert "ETA -:--:--" in console.file.getvalue()
    assert "ETA 4:00" in console.file.getvalue()


def test_a_line_shows_what_fits_the_objective() -> None:
    """DPO: margin and accuracy, not the mean of both sides; beside other kinds their rewards; SFT: top-1."""
    pair = {"loss": 0.6891, "implicit_reward/pair": -0.012, "pair_margin/pair": 0.0084, "pair_accuracy/pair": 0.625}
    assert one_line(pair) == "loss 0.6891  pair margin +0.008, accuracy 62%"
    mixed = pair | {"implicit_reward/score": -0.0001, "tokens_per_second": 1234.5}
    assert one_line(mixed) == "loss 0.6891  reward: score +0.000  pair margin +0.008, accuracy 62%  1234 tokens/s"
    without_loss = {"implicit_reward/score": 0.25, "log_ratio/score": 2.5}
    assert one_line(without_loss) == "reward: score +0.250"
    simpo = {"loss": 0.5, "pair_margin/pair": -0.25, "pair_accuracy/pair": math.nan, "top1/pair": 0.5}
    assert one_line(simpo) == "loss 0.5000  pair margin -0.250, accuracy undefined"
    split = {"loss": 0.25, "implicit_reward/pair": 0.5}
    assert one_line(split) == "loss 0.2500  reward: pair +0.500"
    sft = {"loss": 2.5, "top1/instruction": 0.415, "entropy/instruction": 1.0}
    assert one_line(sft) == "loss 2.5000  top-1 instruction 42%"


def test_other_work_shows_its_progress_and_then_the_bar_is_back(tmp_path: Path) -> None:
    """Off a terminal a first line at once, as the first evaluation may take minutes, and further ones when due."""
    console = Console(file=io.StringIO(), width=200)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={})
    with ConsoleReporter(console, writer, 3) as reporter:
        with reporter.working("evaluating held-out data after step 0", 3200) as on_done:
            on_done(800)
            reporter._last_line -= 60  # a line is due
            on_done(1200)
        with reporter.working("answering held-out prompts after step 0", 8) as on_done:
            on_done(8)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "evaluating held-out data after step 0: 0/3,200",
        "evaluating held-out data after step 0: 1,200/3,200",
    ]


def test_on_a_terminal_the_bar_tells_the_other_work(tmp_path: Path) -> None:
    """And is that of the training again when the work ends, even by an error."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={})
    with ConsoleReporter(console, writer, 3) as reporter:
        with suppress(KeyError), reporter.working("evaluating held-out data after step 0", 32) as on_done:
            on_done(12)
            reporter._progress.refresh()
            raise KeyError
        assert reporter._progress.tasks[0].description == "training"
    assert isinstance(console.file, io.StringIO)
    assert "evaluating held-out data after step 0: 12/32" in console.file.getvalue()


def test_a_long_silence_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is said at once, and again from time to time; after the phase there is no further line."""
    monkeypatch.setattr("uft_ds.record.report.SECONDS_OF_SILENCE", 0.05)
    console = Console(file=io.StringIO(), width=200)
    writer = MetricsWriter(tmp_path, (), run_name="test", config={})
    assert isinstance(console.file, io.StringIO)
    with ConsoleReporter(console, writer, 3) as reporter:
        with reporter.phase("loading base: 65 GB in 14 files"):
            deadline = time.monotonic() + 30
            while "so far" not in console.file.getvalue():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        told = console.file.getvalue()
        time.sleep(0.2)
        assert console.file.getvalue() == told
    first, second, *_ = told.splitlines()
    assert first == "loading base: 65 GB in 14 files"
    assert second == "loading base: 65 GB in 14 files: 0:00 so far"
