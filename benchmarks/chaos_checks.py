"""What must hold after a kill, and of a run that was killed many times once it is done.

Not a benchmark itself: the judgement of benchmarks/chaos.py. Every function returns sentences, one for each thing that
is wrong, so an empty list is the only good answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_processes import Kind
from chaos_scenarios import Run, Unbroken, metrics_of, names_in
from safetensors.numpy import load

from uft_ds.checkpoint.folder import checkpoint_problem, newest_whole, step_of
from uft_ds.data.store.store_files import check_content
from uft_ds.data.store.tokenized import is_whole
from uft_ds.errors import EXIT_DONE, UserError
from uft_ds.host.files import sha256
from uft_ds.host.locks import is_held
from uft_ds.run.progress import progress_of

OF_TIME = ("seconds", "tokens_per_second", "examples_per_second", "memory/peak_gib", "checkpoint/stall_seconds")


def numbers(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [{key: value for key, value in line.items() if key not in OF_TIME} for line in metrics_of(output)]
    return [line for line in lines if len(line) > 1]


# ---- after every kill


def wrong_after_kill(run: Run, unbroken: Unbroken, newest_before: int) -> list[str]:
    """Locks, checkpoints, stores and metrics of a run that has just been killed.

    newest_before: the step of its newest whole checkpoint before this start; -1 for none. None may get lost.
    """
    problems = [f"{path}: the lock is held by nobody's process" for path in locks_of(run) if is_held(path)]
    problems += _wrong_checkpoints(run, unbroken, newest_before)
    problems += _wrong_stores(run, unbroken)
    problems += _wrong_reference_files(run)
    found, expected = numbers(run.output), numbers(unbroken.run.output)
    if found != expected[: len(found)]:
        problems.append(f"metrics.jsonl: {_first_difference(found, expected)}")
    text = (run.output / "metrics.jsonl").read_bytes() if (run.output / "metrics.jsonl").exists() else b""
    if text and not text.endswith(b"\n"):
        problems.append("metrics.jsonl: the last line is torn")
    return problems


def locks_of(run: Run) -> list[Path]:
    found = [run.output / ".uft-run", *run.tokenized.glob(".*.lock"), *run.folder.glob(".*.lock")]
    return [path for path in found if path.exists()]


def newest_step(run: Run) -> int:
    """The step of the newest whole checkpoint; -1 for none."""
    checkpoint, _ = newest_whole(run.output)
    return -1 if checkpoint is None else step_of(checkpoint)


def _wrong_checkpoints(run: Run, unbroken: Unbroken, newest_before: int) -> Iterator[str]:
    """Each one with a manifest is whole and the unbroken run's, bit for bit."""
    for name in run.checkpoints():
        folder = run.output / "checkpoints" / name
        if (folder / "manifest.json").exists():
            problem = checkpoint_problem(folder)
            if problem is not None:
                yield f"{name} has a manifest and is not whole: {problem}"
            else:
                yield from differing_checkpoint(folder, unbroken.run.output / "checkpoints" / name)
    newest = newest_step(run)
    if newest < newest_before:
        yield f"the newest whole checkpoint is of step {newest}, before the start it was of step {newest_before}"


def differing_checkpoint(found: Path, expected: Path) -> Iterator[str]:
    """trainer.json also holds the size of metrics.jsonl, which depends on how many digits a time has."""
    ours, theirs = _files_below(found), _files_below(expected)
    if set(ours) != set(theirs):
        yield f"{found.name}: files {sorted(set(ours) ^ set(theirs))} in one of the two only"
    for name in sorted(set(ours) & set(theirs)):
        if name == "trainer.json":
            pair = [json.loads(path.read_text()) | {"metrics_bytes": 0} for path in (ours[name], theirs[name])]
        elif name == "manifest.json":
            pair = [json.loads(path.read_text()) for path in (ours[name], theirs[name])]
            for manifest in pair:
                del manifest["files"]["trainer.json"]
        else:
            pair = [path.read_bytes() for path in (ours[name], theirs[name])]
        if pair[0] != pair[1]:
            yield f"{found.name}/{name}: not the bits of the unbroken run"


def _wrong_stores(run: Run, unbroken: Unbroken) -> Iterator[str]:
    for name in names_in(run.tokenized):
        if name.startswith(".") or not is_whole(run.tokenized / name):
            continue
        try:
            check_content(run.tokenized / name)
        except UserError as error:
            yield f"tokens that are taken as whole and are not: {error}"
        folders = run.tokenized / name, unbroken.run.tokenized / name
        yield from _differing_files(*folders, "tokens", named=(run.data, unbroken.run.data))


def _wrong_reference_files(run: Run) -> Iterator[str]:
    for path in run.reference.glob("*/[0-9a-f]*.safetensors"):
        if sha256(path) != path.stem:
            yield f"{path.name}: a table of the reference that is taken as whole and is not"
    for path in run.reference.glob("*/*.rejected"):
        yield f"{path.name}: a table of the reference was rejected"


# ---- what `uft status` says


def wrong_status(run: Run, kind: Kind, began: float, *, had_changed: bool) -> list[str]:
    """Whether the status of a killed run is true.

    had_changed: whether this start had begun to write into the folder; before, an older start's status is the newest.
    """
    if not (run.output / ".uft-run").exists():
        return [] if not names_in(run.output) else [f"no lock file beside {names_in(run.output)}"]
    found = progress_of(run.output)
    if (run.output / "DONE").exists():
        is_true = found.exit_code == EXIT_DONE and found.summary.endswith("; done")
        return [] if is_true else [f"status of a run that is done: {found}"]
    steps = max((line["step"] for line in metrics_of(run.output) if "grad_norm" in line), default=0)
    newest = max((int(name.removeprefix("step-")) for name in run.checkpoints()), default=None)
    named = {None: "none", 0: "the start, before any step"}.get(newest, f"step {newest}")
    where = f"step {steps}, newest checkpoint: {named}; "
    said = found.summary.removeprefix(where)
    problems = [] if said != found.summary else [f"status begins otherwise than with {where!r}: {found.summary}"]
    if found.exit_code == EXIT_DONE:
        problems.append(f"exit code 0 of a run that was killed: {found.summary}")
    status = run.output / "status.json"
    is_older = status.exists() and status.stat().st_mtime < began
    silent = "ended without writing a status"
    no_launcher = f"as when the process that started them is killed|{silent}"
    no_rank = rf"rank \d was killed \(signal 9\)|lost its connection to another rank|{silent}"
    # A command that is killed last may have told of the death of the others before.
    allowed = {
        "parent": silent, "launcher": no_launcher, "rank": no_rank, "group": f"{no_rank}|{no_launcher}", "worker": ""
    }[kind]  # fmt: skip
    if not (is_older and not had_changed) and not re.search(allowed, said):
        problems.append(f"status after the {kind} was killed: {said}")
    return problems


# ---- once it is done


def wrong_in_the_end(
    run: Run, unbroken: Unbroken, *, has_report: bool = True, has_whole_cache: bool = True
) -> list[str]:
    """Every difference from the unbroken run, and everything that was left behind.

    has_report: whether no start has said that it could not write the report, as on a full disk. has_whole_cache:
    whether the reference's cache was never deleted; what a checkpoint knows is not stored again.
    """
    of, expected = run.scenario, unbroken.run
    problems = []
    if progress_of(run.output).exit_code != EXIT_DONE:
        problems.append(f"status of a run that is done: {progress_of(run.output).summary}")
    if numbers(run.output) != numbers(expected.output):
        problems.append(f"metrics.jsonl: {_first_difference(numbers(run.output), numbers(expected.output))}")
    names = expected.checkpoints()[-of.keep :]
    if run.checkpoints() != names:
        problems.append(f"checkpoints {run.checkpoints()}, expected {names}")
    for name in set(names) & set(run.checkpoints()):
        problems += differing_checkpoint(*(at.output / "checkpoints" / name for at in (run, expected)))
    for name in ("held_out.csv", "data/report.json"):
        pair = run.output / name, expected.output / name
        if not pair[0].exists() or _text_without_folder(pair[0], run) != _text_without_folder(pair[1], expected):
            problems.append(f"{name}: not that of the unbroken run")
    missing = {name for name in names_in(expected.output) if not name.startswith(".")} - set(names_in(run.output))
    missing -= {"launcher.log"}  # which `uft train` writes alone; all starts of a run may have been torchrun's
    missing -= set() if has_report else {"report.html", "curves.png", "health.png"}
    if missing:
        problems.append(f"missing in the run's folder: {sorted(missing)}")
    ours, theirs = reference_table(run), reference_table(expected)
    if not ours.items() <= theirs.items() or (has_whole_cache and ours != theirs):
        problems.append("the reference's stored log-probs are not those of the unbroken run")
    problems += _wrong_stores(run, unbroken)
    return problems + leftovers(run)


def wrong_merged(run: Run, unbroken: Unbroken, *, may_lack: bool) -> list[str]:
    """The converted model is the unbroken run's, but for its card, which names folders; or there is none yet."""
    if not run.merged.exists():
        return [] if may_lack else ["no converted model"]
    return list(_differing_files(run.merged, unbroken.run.merged, "converted model"))


def wrong_fill(run: Run, unbroken: Unbroken) -> list[str]:
    """A fill that was killed stores every response; to rounding where what was known before changed the packing."""
    ours, theirs = reference_table(run), reference_table(unbroken.run)
    if set(ours) != set(theirs):
        return [f"{len(set(ours) ^ set(theirs))} responses of the reference are in one of the two stores only"]
    off = max(abs(ours[key] - theirs[key]) for key in theirs)
    problems = [] if off <= 1e-4 else [f"log-probs of the reference differ by {off} nats"]
    return [*problems, *_wrong_reference_files(run), *leftovers(run)]


def leftovers(run: Run) -> list[str]:
    """Temporary files and held locks that a finished command leaves."""
    folders = (run.output, run.output / "checkpoints", run.output / "data", run.tokenized, run.folder)
    found = [folder / name for folder in folders for name in names_in(folder) if re.search(r"^\..*\.tmp$", name)]
    found += run.reference.glob("*/.*.tmp")
    found += (run.output / "checkpoints").glob("*.damaged")
    return [f"left behind: {path.relative_to(run.folder)}" for path in found] + [
        f"{path}: the lock is held" for path in locks_of(run) if is_held(path)
    ]


def reference_table(run: Run) -> dict[bytes, float]:
    """All log-probs that a run stored, by response; of two values for one response the first file's."""
    table: dict[bytes, float] = {}
    for path in sorted(run.reference.glob("*/[0-9a-f]*.safetensors"), reverse=True):
        content = load(path.read_bytes())
        table |= dict(zip((key.tobytes() for key in content["keys"]), content["logps"].tolist(), strict=True))
    return table


def _text_without_folder(path: Path, run: Run) -> str:
    return path.read_text(encoding="utf-8").replace(str(run.data), "DATA")


def _files_below(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def _differing_files(
    found: Path, expected: Path, what: str, *, named: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """named: folders whose names may stand in the files; a cache that was copied names the one of its first run."""
    ours, theirs = _files_below(found), _files_below(expected)
    if set(ours) != set(theirs):
        yield f"{what}: files {sorted(set(ours) ^ set(theirs))} in one of the two only"
    for name in sorted(set(ours) & set(theirs) - {"README.md"}):
        contents = [ours[name].read_bytes(), theirs[name].read_bytes()]
        if named is not None:
            for at in named:
                contents = [content.replace(bytes(at), b"DATA") for content in contents]
        if contents[0] != contents[1]:
            yield f"{what}: {name} has not the bits of the unbroken run"


def _first_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    for ours, theirs in zip(found, expected, strict=False):
        keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
        if keys:
            of = ", ".join(f"{key} {ours.get(key)} instead of {theirs.get(key)}" for key in keys[:3])
            return f"step {ours.get('step')}: {of}"
    return f"{len(found)} lines, expected {len(expected)}"
