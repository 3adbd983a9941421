"""A soak of whole runs: SIGKILL at random moments and faults of the disk, and every run resumed until it is done.

    python benchmarks/chaos.py --kills 300 [--seconds 6000] [--seed 0] [--state FOLDER] [--continue] [--parallel 1]
    python benchmarks/chaos.py --state FOLDER --episode 17      (the plan of that episode once more)

Each episode takes a tiny run (one or two ranks, ZeRO-2 or ZeRO-3, pairs or scores beside instruction data, reference
cache on or off, held-out data) and starts it again and again, always by the real command. Each start meets a SIGKILL
(of a rank, of torchrun, of `uft train`, of all its processes), at a moment that is uniform over the time of an unbroken
run or aimed at a phase, or a fault (a full disk, a read-only or vanished folder, a lost cache). The last start is left
alone, and has to end with 0.

After each kill: no process lives, no lock is held, what is taken as whole is whole and has the bits of the unbroken
run, nothing that was saved is lost, `uft status` is true. In the end: adapter, optimiser, metrics (without times),
held-out results, the checkpoints that remain, the reference's stored log-probs and the converted model are those of the
unbroken run, bit for bit, and nothing is left behind. Other episodes kill the preparation of many rows, `uft reference`
and `uft convert`.

Prints what was killed and when; exits with 1 if anything differs, hangs or is left behind. The plan of an episode
follows from the seed and its number; the exact moment of a kill does not. About 12 CPU seconds a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from chaos_checks import (
    leftovers,
    locks_of,
    newest_step,
    wrong_after_kill,
    wrong_fill,
    wrong_in_the_end,
    wrong_merged,
    wrong_status,
)
from chaos_faults import FAULTS, NEED_A_DISK, small_disk
from chaos_processes import Hang, Kind, Start, kill, seconds_to_end, start, wait_for_exit, wait_until
from chaos_scenarios import (
    FILLED,
    PREPARED,
    SCENARIOS,
    TIMEOUT_SECONDS,
    TRAINED,
    Moment,
    Run,
    Unbroken,
    environment,
    moment,
    phase_of,
    unbroken_run,
)
from rich.console import Console
from rich.table import Table

from uft_ds.host.locks import is_held

What = Literal["train", "fill", "convert"]
PHASES = (
    "start", "preparation", "launch", "loading", "step", "checkpoint", "pruning", "evaluation", "finish", "fill",
    "convert",
)  # fmt: skip
ON_RANKS = ("loading", "step", "checkpoint", "pruning", "evaluation", "finish", "fill")
KINDS: tuple[Kind, ...] = ("rank", "launcher", "parent", "group", "worker")
SECONDS_FOR_ORPHANS = 60.0
EXIT_BAD_INPUT, EXIT_BAD_DISK = 1, 2


class Records:
    """What has happened, one JSON object a line: a soak that was stopped goes on with its counts."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.all: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def add(self, **record: Any) -> None:
        with self._lock:
            self.all.append(record)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in list(self.all) if record["event"] == event]


@dataclass
class Episode:
    """One run that is broken again and again.

    number: which, for reproduction. folder: of logs and temporary files; the run lies on a disk of its own, which is
    full at times. has_lost_reference: its cache was deleted once. wrong: all that was found.
    """

    number: int
    folder: Path
    run: Run
    unbroken: Unbroken
    rng: random.Random
    records: Records
    has_disk: bool
    starts: int = 0
    has_lost_reference: bool = False
    wrong: list[str] = field(default_factory=list)

    # ---- one start

    def begin(self, command: list[str]) -> Start:
        self.starts += 1
        temporary = self.folder / f"tmp-{self.starts}"
        return start(command, environment(temporary), self.folder / f"start-{self.starts:02d}.log")

    def judge(self, problems: Iterable[str], started: Start) -> None:
        for problem in problems:
            self.wrong.append(problem)
            tail = "\n".join(started.output.splitlines()[-12:])
            self.records.add(event="wrong", episode=self.number, start=self.starts, problem=problem, output=tail)

    def cleared(self, started: Start) -> float:
        """Wait until nothing of a start is left, then forget its temporary folder."""
        seconds = seconds_to_end(started, SECONDS_FOR_ORPHANS)
        shutil.rmtree(self.folder / f"tmp-{self.starts}", ignore_errors=True)
        return seconds

    def killed(self, what: What, command: list[str], kind: Kind, aim: Moment) -> bool:
        """Start, kill, and check what is left; whether nothing remains to be done."""
        newest = newest_step(self.run) if what == "train" else -1
        started = self.begin(command)
        is_now = moment(aim, self.run, started, self.unbroken.seconds[what], self.rng)
        if not wait_until(started, is_now, TIMEOUT_SECONDS):
            return self._ended(what, started, aim)
        if self.rng.random() < 0.3:
            self._look(what, started)
        phase = phase_of(what, self.run, started)
        hit = kill(started, kind, self.rng)
        code = wait_for_exit(started, TIMEOUT_SECONDS)
        if hit is None:
            return self._ended(what, started, aim)
        seconds = self.cleared(started)
        self.records.add(
            event="kill", episode=self.number, start=self.starts, scenario=self.run.scenario.name, what=what, kind=hit,
            aim=aim, phase=phase, code=code, orphan_seconds=round(seconds, 3), said=_last_line(started),
        )  # fmt: skip
        if hit in ("rank", "launcher") and code == 0 and phase != "finish":
            self.judge([f"exit code 0 though the {hit} was killed"], started)
        if what == "train":
            had_changed = any(said in started.output for said in ("resuming from", "starting at step 0"))
            self.judge(wrong_status(self.run, hit, started.began, had_changed=had_changed), started)
            self.judge(wrong_after_kill(self.run, self.unbroken, newest), started)
            return (self.run.output / "DONE").exists()
        self.judge([f"{path}: held by no living process" for path in locks_of(self.run) if is_held(path)], started)
        self.judge(wrong_merged(self.run, self.unbroken, may_lack=True) if what == "convert" else [], started)
        return self.run.merged.exists()

    def _look(self, what: What, started: Start) -> None:
        """Some runs are looked at while they live: `uft status` then says so."""
        from uft_ds.run.progress import progress_of

        lock = self.run.output / ".uft-run"
        is_launched = what == "train" and "training on" in started.output
        if is_launched and lock.exists() and not (self.run.output / "DONE").exists():
            summary = progress_of(self.run.output).summary
            if started.process.poll() is None and not summary.endswith(("; running", "; done")):
                self.judge([f"status of a run that goes on: {summary}"], started)

    def _ended(self, what: What, started: Start, aim: str) -> bool:
        code = wait_for_exit(started, TIMEOUT_SECONDS)
        self.cleared(started)
        self.records.add(event="ended", episode=self.number, start=self.starts, what=what, aim=aim, code=code)
        if code != 0:
            self.judge([f"exit code {code} of a start that nothing was done to: {_last_line(started)}"], started)
        return True

    def faulty(self, name: str, aim: Moment | None) -> bool:
        """Start and break something, at once or at a moment, then wait for the end; whether the run is done."""
        newest = newest_step(self.run)
        if aim is None:
            with FAULTS[name](self.run, self.rng):
                started = self.begin(self.run.train())
                code = wait_for_exit(started, TIMEOUT_SECONDS)
        else:
            started = self.begin(self.run.train())
            is_now = moment(aim, self.run, started, self.unbroken.seconds["train"], self.rng)
            if not wait_until(started, is_now, TIMEOUT_SECONDS):
                return self._ended("train", started, aim)
            with FAULTS[name](self.run, self.rng):
                code = wait_for_exit(started, TIMEOUT_SECONDS)
        self.cleared(started)
        said = _last_line(started)
        self.records.add(
            event="fault", episode=self.number, start=self.starts, scenario=self.run.scenario.name, kind=name,
            aim=aim or "before", code=code, said=said,
        )  # fmt: skip
        if code not in (0, EXIT_BAD_DISK) or "Traceback" in started.output:
            self.judge([f"{name}: exit code {code}: {said}"], started)
        self.judge(wrong_after_kill(self.run, self.unbroken, newest), started)
        return (self.run.output / "DONE").exists()

    def finished(self, what: What, command: list[str]) -> None:
        """A start that is left alone."""
        started = self.begin(command)
        code = wait_for_exit(started, TIMEOUT_SECONDS)
        self.cleared(started)
        self.records.add(event="resume", episode=self.number, start=self.starts, what=what, code=code)
        if code != 0:
            self.judge([f"{what} is not finished: exit code {code}: {_last_line(started)}"], started)

    def lose(self, cache: str) -> None:
        """Delete a cache before the next start, which may happen at any time."""
        shutil.rmtree(self.run.tokenized if cache == "token cache" else self.run.reference, ignore_errors=True)
        self.has_lost_reference |= cache == "reference cache"
        self.records.add(
            event="fault", episode=self.number, start=self.starts, scenario=self.run.scenario.name,
            kind=f"lost {cache}", aim="before", code="-",
        )  # fmt: skip

    # ---- whole episodes

    def train(self) -> None:
        rng, is_done = self.rng, False
        for _ in range(rng.randint(8, 14)):
            if is_done:
                break
            has_checkpoints = (self.run.output / "checkpoints").exists()
            if rng.random() < 0.1:
                self.lose(rng.choice(("token cache", "reference cache")))
            if has_checkpoints and rng.random() < 0.2:
                names = [name for name in FAULTS if self.has_disk or name not in NEED_A_DISK]
                name = rng.choice(names)
                aims: tuple[Moment | None, ...] = (None, "step", "checkpoint", "evaluation")
                at_once = name in ("vanished data", "file for checkpoints")
                is_done = self.faulty(name, None if at_once else rng.choice(aims))
                continue
            aims_of_kill: tuple[Moment, ...] = (
                "any", "any", "loading", "step", "step", "checkpoint", "checkpoint", "evaluation", "pruning",
                "finish",
            )  # fmt: skip
            kinds: tuple[Kind, ...] = ("rank", "rank", "launcher", "parent", "group")
            command = self.run.train(by_torchrun=rng.random() < 0.7)
            is_done = self.killed("train", command, rng.choice(kinds), rng.choice(aims_of_kill))
        self.finished("train", self.run.train())
        self._judge_in_the_end()

    def prepare(self) -> None:
        for _ in range(8):
            others = ("worker", "worker") if self.run.scenario.workers > 1 else ()
            kind = self.rng.choice(("parent", "group", *others))
            aim: Moment = self.rng.choice(("preparation", "preparation", "any"))
            if self.killed("train", self.run.train(), cast(Kind, kind), aim):
                break
        self.finished("train", self.run.train())
        self._judge_in_the_end()

    def fill(self) -> None:
        for _ in range(4):
            kind = self.rng.choice(("rank", "launcher", "parent", "group"))
            aim: Moment = self.rng.choice(("any", "fill", "fill"))
            if self.killed("fill", self.run.fill(), cast(Kind, kind), aim):
                break
        self.finished("fill", self.run.fill())
        self.wrong += self._recorded(wrong_fill(self.run, self.unbroken))

    def convert(self) -> None:
        source = self.unbroken.run.output
        for _ in range(8):
            kind = self.rng.choice(("parent", "group"))
            aim: Moment = self.rng.choice(("any", "convert", "convert"))
            if self.killed("convert", self.run.convert(source), cast(Kind, kind), aim):
                break
        if not self.run.merged.exists():
            self.finished("convert", self.run.convert(source))
        self.wrong += self._recorded([*wrong_merged(self.run, self.unbroken, may_lack=False), *leftovers(self.run)])

    def _judge_in_the_end(self) -> None:
        has_report = not any("report.html could not be written" in log.read_text() for log in self.folder.glob("*.log"))
        has_cache = not self.has_lost_reference
        problems = wrong_in_the_end(self.run, self.unbroken, has_report=has_report, has_whole_cache=has_cache)
        if self.rng.random() < 0.4:  # equal bits are converted to equal bits: some of them are enough
            self.finished("convert", self.run.convert())
            problems += wrong_merged(self.run, self.unbroken, may_lack=False)
        self.wrong += self._recorded(problems)

    def _recorded(self, problems: list[str]) -> list[str]:
        for problem in problems:
            self.records.add(event="wrong", episode=self.number, start=self.starts, problem=problem, output="")
        return problems


def _last_line(started: Start) -> str:
    return next((line for line in reversed(started.output.splitlines()) if line.strip()), "")[:300]


PLANS: dict[str, Callable[[Episode], None]] = {
    "train": Episode.train, "prepare": Episode.prepare, "fill": Episode.fill, "convert": Episode.convert
}  # fmt: skip
WEIGHTS = {"train": 6, "prepare": 1, "fill": 1, "convert": 2}


def play(number: int, seed: int, state: Path, unbroken: dict[str, Unbroken], records: Records) -> int:
    """One episode; returns how many things were wrong. Its folder is kept if there were any."""
    rng = random.Random(f"{seed}/{number}")
    plan = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    scenario = {
        "train": rng.choices(TRAINED, (5, 5, 1, 1))[0],
        "prepare": rng.choices(PREPARED, (2, 1))[0],
        "fill": FILLED,
        "convert": TRAINED[0],
    }[plan]
    of, folder = unbroken[scenario.name], state / "episodes" / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    disk = folder / "disk"
    with small_disk(disk) as has_disk:
        # A copy of the rows, because a fault moves them away while another episode reads them.
        shutil.copytree(of.run.data, disk / "data")
        run = Run(scenario, disk, disk / "data", of.run.base)
        if plan == "train":
            shutil.copytree(of.run.tokenized, run.tokenized)
        run.write_recipe()
        episode = Episode(number, folder, run, of, rng, records, has_disk)
        try:
            PLANS[plan](episode)
        except Hang as hang:
            records.add(event="wrong", episode=number, start=episode.starts, problem=f"hang: {hang}", output="")
            episode.wrong.append(str(hang))
        if episode.wrong:
            shutil.copytree(folder, state / "kept" / f"{number:04d}", symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    records.add(event="episode", episode=number, plan=plan, scenario=scenario.name, wrong=len(episode.wrong))
    return len(episode.wrong)


def soak(options: argparse.Namespace, unbroken: dict[str, Unbroken], records: Records) -> None:
    deadline = time.monotonic() + options.seconds
    number = 1 + max((record["episode"] for record in records.all), default=-1)

    def is_enough() -> bool:
        return len(records.of("kill")) >= options.kills or time.monotonic() > deadline

    running: set[Future[int]] = set()
    with ThreadPoolExecutor(options.parallel) as pool:
        while running or not is_enough():
            while len(running) < options.parallel and not is_enough():
                running.add(pool.submit(play, number, options.seed, options.state, unbroken, records))
                number += 1
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    future.result()
                except Exception as error:  # noqa: BLE001 - one episode that cannot be played ends no soak
                    problem = f"the soak itself: {type(error).__name__}: {error}"
                    records.add(event="wrong", episode=number, start=0, problem=problem, output="")
            kills, wrong = len(records.of("kill")), len(records.of("wrong"))
            print(f"{kills} kills, {len(records.of('fault'))} faults, {wrong} wrong", flush=True)


def show(records: Records, console: Console, seed: int) -> bool:
    """Print what happened; whether all was well."""
    kills = records.of("kill")
    table = Table("phase", *KINDS, "all", title="SIGKILL, by what was hit and what the command was doing")
    for phase in PHASES:
        of_phase = Counter(record["kind"] for record in kills if record["phase"] == phase)
        if of_phase:
            table.add_row(phase, *(str(of_phase[kind] or "") for kind in KINDS), str(of_phase.total()))
    total = Counter(record["kind"] for record in kills)
    table.add_row("all", *(str(total[kind] or "") for kind in KINDS), str(total.total()))
    console.print(table)
    faults = Table("fault", "times", "exit codes")
    for name in (*FAULTS, "lost token cache", "lost reference cache"):
        codes = Counter(str(record["code"]) for record in records.of("fault") if record["kind"] == name)
        if codes:
            faults.add_row(name, str(codes.total()), ", ".join(f"{code}: {n}" for code, n in sorted(codes.items())))
    console.print(faults)
    on_ranks = sum(record["phase"] in ON_RANKS for record in kills)
    episodes = records.of("episode")
    resumes = sum(record["event"] in ("kill", "fault", "resume", "ended") for record in records.all) - len(episodes)
    console.print(f"{len(kills)} kills, {on_ranks} of them while ranks were alive; {len(records.of('fault'))} faults")
    console.print(f"{len(episodes)} episodes of seed {seed}, {resumes} starts after a kill or a fault")
    console.print(f"longest life of an orphan: {max((r['orphan_seconds'] for r in kills), default=0.0):.2f} s")
    wrong = records.of("wrong")
    for record in wrong:
        console.print(f"WRONG, episode {record['episode']}, start {record['start']}: {record['problem']}", markup=False)
    console.print(f"differences, leftovers and hangs: {len(wrong)}")
    return not wrong


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="stop once there have been so many")
    parser.add_argument("--seconds", type=float, default=6000.0, help="begin no episode after that time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1, help="episodes at the same time")
    parser.add_argument("--state", type=Path, help="where everything is written; default: a temporary folder")
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="keep the counts that the state holds")
    parser.add_argument("--episode", type=int, help="play this one alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(1)
    options.state = (options.state or Path(tempfile.mkdtemp(prefix="uft-chaos-"))).resolve()
    options.state.mkdir(parents=True, exist_ok=True)
    path = options.state / "records.jsonl"
    if path.exists() and not options.goes_on and options.episode is None:
        print(f"{path}: holds an earlier soak; give --continue, or another --state", file=sys.stderr)
        return EXIT_BAD_INPUT
    records = Records(path if options.episode is None else options.state / f"episode-{options.episode}.jsonl")
    names = SCENARIOS
    unbroken = {
        name: unbroken_run(names[name], options.state / "unbroken" / name.replace(", ", "-").replace(" ", "-"))
        for name in names
    }
    print(f"unbroken runs: {', '.join(f'{name} {of.seconds}' for name, of in unbroken.items())}", flush=True)
    with small_disk(options.state / "probe") as has_disk:
        if not has_disk:
            print(f"no file system can be mounted here: {', '.join(NEED_A_DISK)} are NOT tried", flush=True)
    if options.episode is not None:
        play(options.episode, options.seed, options.state, unbroken, records)
    else:
        soak(options, unbroken, records)
    console = Console(width=int(os.environ.get("COLUMNS", "120")))
    return 0 if show(records, console, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
