"""What a user sees of a run off a terminal."""

import io
import math
from pathlib import Path

from rich.console import Console

from uft_ds.record.metrics import MetricsWriter, read_metrics
from uft_ds.record.report import ConsoleReporter


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
    assert console.file.getvalue() == "held out, step 0:  loss 0.2500  reward score +nan\n"


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
