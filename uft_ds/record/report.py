"""Reports of a running run to the user: a progress line with ETA, warnings, and metrics in their files."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from uft_ds.data.example import KINDS
from uft_ds.record.metrics_file import MetricsWriter

logger = logging.getLogger("uft_ds")

OnDone = Callable[[int], None]
"""Called with the amount of work that is done."""


class Speaker(Protocol):
    """Receives sentences for the user. All ranks call it; one of them shows the sentences."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Announcer(Speaker, Protocol):
    """A speaker that also tells what is done in a long silence."""

    def phase(self, what: str, *, announce: bool = True) -> AbstractContextManager[None]: ...


class Reporter(Announcer, Protocol):
    """Receives the events of the training loop."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def held_out(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def tasks(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, waited_seconds: float) -> None: ...
    def working(self, what: str, total: int) -> AbstractContextManager[OnDone]: ...
    @property
    def metrics_bytes(self) -> int: ...
    def __enter__(self) -> Reporter: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SilentReporter:
    """The reporter of ranks that only write to their log."""

    metrics_bytes = 0

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def held_out(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def tasks(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def checkpoint(self, step: int, waited_seconds: float) -> None: ...

    @contextmanager
    def working(self, what: str, total: int) -> Iterator[OnDone]:
        yield lambda done: None

    @contextmanager
    def phase(self, what: str, *, announce: bool = True) -> Iterator[None]:
        yield

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        logger.warning(text)

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


_UNKNOWN = "-:--:--"
SECONDS_BETWEEN_LINES = 5.0
"""Time between progress lines if the output is not a terminal."""
SECONDS_OF_SILENCE = 15.0
"""Time between lines that say that a phase without progress of its own is still going on."""


class _ProgressLine:
    """Sentences for the user, and a progress bar on a terminal; without a console everything goes to the log alone."""

    def __init__(self, console: Console | None, task: str, total: int) -> None:
        self._console, self._last_line = console, time.monotonic()
        self._progress, self._name, self._has_worked = _progress(console), task, False
        self._task = self._progress.add_task(task, total=total, numbers="", eta=_UNKNOWN)

    def say(self, text: str) -> None:
        logger.info(text)
        if self._console is not None:
            _print(self._console, text)

    def warn(self, text: str) -> None:
        logger.warning(text)
        if self._console is not None:
            _print(self._console, f"warning: {text}", style="yellow")

    @contextmanager
    def phase(self, what: str, *, announce: bool = True) -> Iterator[None]:
        """Announce work that has no progress of its own, and say from time to time that it is still going on.

        Args:
            announce: whether it is said at once, or only where it takes long: what every step does is not worth a line.
        """
        if announce:
            self.say(what)
        else:
            logger.info(what)
        started, is_over = time.monotonic(), threading.Event()

        def go_on() -> None:
            while not is_over.wait(SECONDS_OF_SILENCE):
                text = f"{what}: {_clock(time.monotonic() - started)} so far"
                logger.info(text)
                # On a terminal the bar shows it, with a clock that runs.
                if self._console is not None and not self._console.is_terminal:
                    _print(self._console, text)

        self._progress.update(self._task, description=what)
        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self._progress.update(self._task, description=self._name)

    @contextmanager
    def working(self, what: str, total: int) -> Iterator[OnDone]:
        """Show the progress of other work than steps; the bar, or a line every few seconds, tells it meanwhile.

        Args:
            what: such as "evaluating held-out data". total: the amount of it.
        """
        logger.info("%s: %d", what, total)

        def on_done(done: int) -> None:
            text = f"{what}: {done:,}/{total:,}"
            self._progress.update(self._task, description=text)
            # The first one may take minutes, before any step has shown that the run is alive.
            if self._is_line_due(always=not self._has_worked):
                assert self._console is not None
                _print(self._console, text)
            self._has_worked = True

        on_done(0)
        try:
            yield on_done
        finally:
            self._progress.update(self._task, description=self._name)

    def _is_line_due(self, *, always: bool) -> bool:
        """Whether a line of progress is printed now, where no bar is shown."""
        now = time.monotonic()
        if self._console is None or self._console.is_terminal:
            return False
        if not always and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class ConsoleReporter(_ProgressLine):
    """Shows a live progress bar on a terminal; elsewhere it prints a line every few seconds."""

    def __init__(self, console: Console, writer: MetricsWriter, num_steps: int) -> None:
        super().__init__(console, "training", num_steps)
        self._writer, self._num_steps = writer, num_steps
        self._training_seconds, self._steps_here = 0.0, 0

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.write(step, metrics)
        self._training_seconds, self._steps_here = self._training_seconds + metrics["seconds"], self._steps_here + 1
        line = one_line(metrics)
        logger.info("step %d %s", step, line)
        eta = _clock(self._training_seconds / self._steps_here * (self._num_steps - step))
        self._progress.update(self._task, completed=step, numbers=line, eta=eta)
        if self._is_line_due(always=step in (1, self._num_steps)):
            assert self._console is not None
            _print(self._console, f"step {step}/{self._num_steps}  {line}  ETA {eta}")

    def held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.write(step, metrics)
        self.say(f"held out, step {step}:  {one_line({k.removeprefix('held_out/'): v for k, v in metrics.items()})}")

    def tasks(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.write(step, metrics)
        self.say(f"tasks, step {step}:  {one_line({k.removeprefix('tasks/'): v for k, v in metrics.items()})}")

    def checkpoint(self, step: int, waited_seconds: float) -> None:
        self._writer.write(step, {"checkpoint/stall_seconds": waited_seconds})
        logger.info("checkpoint of step %d: training waited %.3f s for its copy", step, waited_seconds)

    @property
    def metrics_bytes(self) -> int:
        return self._writer.num_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._writer.close()


class FillReporter(_ProgressLine):
    """Shows the progress of filling the reference cache, in responses; without a console it only logs."""

    def __init__(self, console: Console | None, num_responses: int) -> None:
        super().__init__(console, "reference", num_responses)
        self._total, self._done, self._computed = num_responses, 0, 0
        self._started = time.monotonic()

    def group(self, visited: int, computed: int) -> None:
        """Record that `visited` more responses are done, of which `computed` had to be forwarded."""
        self._done, self._computed = self._done + visited, self._computed + computed
        line = f"{self._computed} computed"
        eta = _clock((time.monotonic() - self._started) / self._done * (self._total - self._done))
        self._progress.update(self._task, completed=self._done, numbers=line, eta=eta)
        if self._is_line_due(always=self._done == self._total):
            self.say(f"reference: {self._done}/{self._total} responses, {line}  ETA {eta}")


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        # Not rich's own estimate, which looks at the last 30 s alone: a step may take longer.
        TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}"),
    )  # fmt: skip
    is_live = console is not None and console.is_terminal
    # If rich redirected the streams, the output of libraries would go to the terminal and not to the rank's log.
    return Progress(*columns, console=console, disable=not is_live, redirect_stdout=False, redirect_stderr=False)


def one_line(metrics: Mapping[str, float]) -> str:
    """The few most important numbers of a step or an evaluation in one line: loss if there is one, what fits each
    kind, speed.

    Of pairs that stay together it is the margin and the accuracy, because the mean reward of both sides says nothing;
    of other responses the implicit reward, or a reward model's; without any of these, as in SFT, the share of most
    probable tokens. Online, also the mean score of the policy's answers.
    """
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    margin = metrics.get("pair_margin/pair")
    rewards = _by_kind(metrics, "implicit_reward") or _by_kind(metrics, "reward")
    if margin is not None:
        rewards.pop("pair", None)
    if rewards:
        parts.append("reward: " + ", ".join(f"{kind} {_signed(reward)}" for kind, reward in rewards.items()))
    if margin is not None:
        parts.append(f"pair margin {_signed(margin)}, accuracy {_percent(metrics['pair_accuracy/pair'])}")
    if "rollouts/score" in metrics:
        parts.append(f"score of answers {metrics['rollouts/score']:.3f}")
    if not rewards and margin is None:
        shares = _by_kind(metrics, "top1")
        parts += [f"top-1 {kind} {_percent(share)}" for kind, share in shares.items()]
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)


def _by_kind(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    found = {kind: metrics.get(f"{name}/{kind}") for kind in KINDS}
    return {kind: value for kind, value in found.items() if value is not None}


def _signed(reward: float) -> str:
    return f"{round(reward, 3) + 0.0:+.3f}"  # "+ 0.0" turns -0.0 into 0.0


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "undefined"


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
