"""What a user sees of a run off a terminal."""

import io
from pathlib import Path

from rich.console import Console

from uft_ds.training.metrics import MetricsWriter
from uft_ds.training.report import ConsoleReporter


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
