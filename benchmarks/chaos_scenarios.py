"""The tiny runs that benchmarks/chaos.py kills: their recipes, the moments to hit, and each one's unbroken run.

Not a benchmark itself.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chaos_processes import FRESH_SECONDS, Start, seconds_to_end, start, wait_for_exit
from tiny import build_tiny_model

TIMEOUT_SECONDS = 1200.0
Moment = Literal[
    "any", "preparation", "loading", "step", "checkpoint", "evaluation", "pruning", "finish", "fill", "convert"
]


@dataclass(frozen=True)
class Scenario:
    """A run, small enough that its start is nearly all of its cost.

    rows: of each source; a run with many of them spends its time in preparation. workers: that tokenise.
    kinds: of its two sources. cache: of the reference.
    """

    name: str
    ranks: int
    deepspeed: str
    kinds: tuple[str, str]
    cache: bool
    steps: int = 14
    checkpoint_every: int = 1
    evaluate_every: int = 2
    keep: int = 2
    rows: int = 24
    reward_shift: str = "none"
    workers: int = 1


TRAINED = (
    Scenario("pairs, cache", 1, "zero2", ("instruction", "pair"), cache=True),
    Scenario("scores", 1, "zero3_cpu", ("instruction", "scored"), cache=False, reward_shift="ema"),
    Scenario("pairs, 2 ranks", 2, "zero3_cpu", ("instruction", "pair"), cache=True, checkpoint_every=2, keep=1),
    Scenario("scores, 2 ranks", 2, "zero2", ("instruction", "scored"), cache=False, evaluate_every=3),
)
PREPARED = (
    Scenario("many rows", 1, "zero3_cpu", ("instruction", "pair"), cache=True, steps=2, rows=2500),
    Scenario("by two processes", 1, "zero2", ("instruction", "scored"), cache=False, steps=2, rows=2500, workers=2),
)
FILLED = Scenario("reference", 1, "zero3_cpu", ("instruction", "scored"), cache=True, rows=600)
SCENARIOS = {scenario.name: scenario for scenario in (*TRAINED, *PREPARED, FILLED)}


@dataclass(frozen=True)
class Run:
    """Where one run of a scenario lies. data: its rows, shared by all runs of the scenario. base: the model."""

    scenario: Scenario
    folder: Path
    data: Path
    base: Path

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def tokenized(self) -> Path:
        return self.folder / "tokenized"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self, *, keep_all: bool = False) -> None:
        """keep_all: keep every checkpoint, which changes nothing else of a run."""
        of = self.scenario
        sources: list[dict[str, Any]] = [
            {"format": "jsonl", "path": str(self.data / f"{kind}.jsonl")} for kind in of.kinds
        ]
        if of.rows > 100 and of is not FILLED:
            sources = [source | {"examples": 16} for source in sources]
        losses = {"instruction": "mse", "score": "mse"} | ({"pair": "dpo"} if "pair" in of.kinds else {})
        tree: dict[str, Any] = {
            "name": "chaos",
            "model": {"base": str(self.base), "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8.0},
            "data": {
                "max_length": 64,
                "cache_dir": str(self.tokenized),
                "workers": of.workers,
                "sources": sources,
                "held_out": [{"format": "jsonl", "path": str(self.data / "held_out.jsonl")}],
            },
            "objective": {"loss": losses, "beta": 0.1},
            "train": {
                "examples_per_step": 8,
                "tokens_per_micro_batch": 128,
                "steps": of.steps,
                "lr": 1e-2,
                "evaluate_every": of.evaluate_every,
                "checkpoint_every": of.checkpoint_every,
                "keep_checkpoints": 1000 if keep_all else of.keep,
            },
            "reference": {"cache": of.cache, "cache_dir": str(self.reference)},
            "launch": {"ranks": of.ranks},
            "tracking": ["tensorboard"],
            "deepspeed": of.deepspeed,
            "output": str(self.output),
        }
        tree["objective"]["reward_shift"] = of.reward_shift
        self.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")

    # Commands

    def train(self, *, by_torchrun: bool = False) -> list[str]:
        if not by_torchrun:
            return uft("train", str(self.recipe), "--resume")
        port = str(random.SystemRandom().randint(20_000, 32_000))
        ranks = str(self.scenario.ranks)
        launcher = ["torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port, "-m", "uft_ds.train"]
        return [sys.executable, "-m", *launcher, str(self.recipe), "--resume"]

    def fill(self) -> list[str]:
        return uft("reference", str(self.recipe))

    def convert(self, source: Path | None = None) -> list[str]:
        return uft("convert", str(source or self.output), str(self.merged))

    # What can be seen from outside while it runs

    def steps_seen(self) -> int:
        """The last step whose line stands in metrics.jsonl; -1 before the first evaluation."""
        return max((line["step"] for line in metrics_of(self.output)), default=-1)

    def temporary_checkpoints(self) -> list[str]:
        return [name for name in names_in(self.output / "checkpoints") if name.endswith(".tmp")]

    def checkpoints(self) -> list[str]:
        return sorted(name for name in names_in(self.output / "checkpoints") if name.startswith("step-"))


def uft(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "uft_ds", *arguments]


def names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    try:
        text = (output / "metrics.jsonl").read_bytes()
    except OSError:
        return []
    found = []
    for line in text.split(b"\n")[:-1]:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def environment(temporary: Path) -> dict[str, str]:
    """For one start: deterministic, quiet, offline, and with a folder of its own for DeepSpeed's compiled operators."""
    temporary.mkdir(parents=True, exist_ok=True)
    return dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(temporary / "cache"),
        "TORCH_EXTENSIONS_DIR": tempfile.mkdtemp(prefix="extensions-", dir=temporary),
    }


# ---- the unbroken run of each scenario


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing has touched, with all of its checkpoints; seconds: how long each command took."""

    run: Run
    seconds: dict[str, float]


def unbroken_run(scenario: Scenario, folder: Path) -> Unbroken:
    """Make it, or find it where an earlier soak has made it.

    Raises:
        RuntimeError: it fails without any kill.
    """
    run = Run(scenario, folder, folder / "data", folder.parent / "base")
    measured = folder / "seconds.json"
    if not measured.exists():
        if not run.base.exists():
            build_tiny_model(run.base)
        write_data(scenario, run.data)
        run.write_recipe(keep_all=True)
        commands = {"train": run.train(), "convert": run.convert()}
        if scenario is FILLED:
            commands = {"fill": run.fill()}
        seconds = {}
        for name, command in commands.items():
            began = time.monotonic()
            _run(command, folder, name)
            seconds[name] = time.monotonic() - began
        measured.write_text(json.dumps(seconds), encoding="utf-8")
    return Unbroken(run, json.loads(measured.read_text(encoding="utf-8")))


def _run(command: list[str], folder: Path, name: str) -> None:
    started = start(command, environment(folder / "tmp"), folder / f"{name}.log")
    code = wait_for_exit(started, TIMEOUT_SECONDS)
    seconds_to_end(started, 30.0)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {code} without any kill\n{started.output}")


def write_data(scenario: Scenario, folder: Path) -> None:
    """Rows of uneven length; every one differs, so that no two share a reference."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = range(scenario.rows)
    of_kind: dict[str, list[dict[str, Any]]] = {
        "instruction": [{"prompt": f"Say {i}", "response": f"yes {i} " * (1 + i % 4)} for i in rows],
        "scored": [{"prompt": f"Rate {i}", "response": f"no {i} " * (1 + i % 3), "score": i % 3 / 2} for i in rows],
        "pair": [
            {"prompt": f"Choose {i}", "chosen": f"left {i} " * (1 + i % 3), "rejected": f"right {i}"} for i in rows
        ],
        "held_out": [
            {"prompt": f"Weigh {i}", "response": f"held {i} " * (1 + i % 3), "score": i / 8} for i in range(9)
        ],
    }
    for name in (*scenario.kinds, "held_out"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind[name]))


# ---- moments


def moment(name: Moment, run: Run, started: Start, duration: float, rng: random.Random) -> Callable[[], bool]:
    """A predicate that becomes true at a random time within a phase of the run; it is asked every few milliseconds.

    duration: seconds of the unbroken command; moments of `any` are uniform over it.
    """
    if name == "any":
        due = time.monotonic() + rng.uniform(0.0, duration)
        return lambda: time.monotonic() >= due
    ahead = max(0, run.steps_seen()) + rng.randint(0, 2)
    tables = len(list(run.reference.glob("*/*")))
    aims: dict[str, tuple[Callable[[], bool], float]] = {
        "preparation": (lambda: any(name.endswith(".tmp") for name in names_in(run.tokenized)), 1.5),
        "loading": (lambda: any(process.role == "rank" for process in started.processes(FRESH_SECONDS)), 5.0),
        "step": (lambda: run.steps_seen() >= ahead, 0.2),
        "checkpoint": (lambda: _step_of_temporary(run, started.began) >= ahead, 0.02),
        "evaluation": (lambda: _is_evaluating(run, ahead), 0.03),
        "pruning": (lambda: _has_just_committed(run, started.began, ahead), 0.004),
        "finish": (lambda: run.steps_seen() >= run.scenario.steps, 1.0),
        "fill": (lambda: len(list(run.reference.glob("*/*"))) > tables, 1.0),
        "convert": (lambda: (run.folder / ".merged.tmp").exists(), 1.5),
    }
    has_come, span = aims[name]
    delay, since = rng.uniform(0.0, span), [0.0]

    def is_now() -> bool:
        if not since[0] and has_come():
            since[0] = time.monotonic()
            if span < 0.1:  # shorter than it takes until this is asked again
                time.sleep(delay)
        return bool(since[0]) and time.monotonic() >= since[0] + delay

    return is_now


def _step_of_temporary(run: Run, since: float) -> int:
    """The step of the checkpoint that is being written; -1 if there is none. Those of earlier starts do not count."""
    newest = -1
    for name in run.temporary_checkpoints():
        with suppress(OSError):  # it has just been renamed
            if (run.output / "checkpoints" / name).stat().st_mtime >= since:
                newest = max(newest, int(name.removeprefix(".step-").removesuffix(".tmp")))
    return newest


def _has_just_committed(run: Run, since: float, ahead: int) -> bool:
    """Waits for the end of a checkpoint that is being written: what follows, pruning, takes a millisecond."""
    if _step_of_temporary(run, since) < ahead:
        return False
    deadline = time.monotonic() + 2.0
    while run.temporary_checkpoints() and time.monotonic() < deadline:
        pass
    return True


def _is_evaluating(run: Run, ahead: int) -> bool:
    lines = metrics_of(run.output)
    if not lines or "grad_norm" not in lines[-1]:
        return False
    step = lines[-1]["step"]
    return step >= ahead and (step % run.scenario.evaluate_every == 0 or step == run.scenario.steps)


def _is_pruning(run: Run) -> bool:
    found = run.checkpoints()
    folder = run.output / "checkpoints"
    return len(found) > run.scenario.keep or any(not (folder / name / "manifest.json").exists() for name in found)


def phase_of(what: Literal["train", "fill", "convert"], run: Run, started: Start) -> str:
    """What a command was doing, as far as folders and output show it. loading: ranks live, and have not begun."""
    if what == "convert":
        return "convert" if (run.folder / ".merged.tmp").exists() else "start"
    roles = {process.role for process in started.processes(2 * FRESH_SECONDS)}
    has_launched = "rank" in roles
    if not has_launched:
        if (run.output / "DONE").exists():
            return "finish"
        if any(name.endswith(".tmp") for name in names_in(run.tokenized)):
            return "preparation"
        return "launch" if "launcher" in roles else "start"
    if "before the first step" not in started.output:
        return "loading"
    if what == "fill":
        return "fill"
    if run.steps_seen() >= run.scenario.steps:
        return "finish"
    if run.temporary_checkpoints():
        return "checkpoint"
    if _is_pruning(run):
        return "pruning"
    return "evaluation" if _is_evaluating(run, 0) else "step"
