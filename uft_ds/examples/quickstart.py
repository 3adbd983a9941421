"""`uft quickstart`: train a small real model on verifiable data or on its own answers; measured before and after."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from uft_ds.errors import UserError
from uft_ds.evaluation.generate import check_model_folder
from uft_ds.examples.measuring import MAX_NEW_TOKENS, RESULT, Answer, answers_of, compared, finish, graded
from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.examples.verifiable import Task, read_tasks, write
from uft_ds.export.convert import convert_to_merged
from uft_ds.host.files import sha256, write_atomically
from uft_ds.host.process import ended_as_by_ctrl_c
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.identity import may_change
from uft_ds.run.resume import recipe_changes
from uft_ds.run.settings import located


def run_quickstart(folder: Path, overrides: tuple[str, ...], *, console: Console, train: Callable[..., None]) -> None:
    """Fetch the model, generate data, measure, train, convert and measure again.

    An interrupted quickstart goes on: the base's answers are kept beside the data, and the run is resumed.

    Args:
        train: the function behind `uft train`, called as `train(settings, overwrite=..., resume=...)`.
    Raises:
        UserError: the folder cannot be used.
        CheckFailed: the held-out score did not rise.
    """
    started = time.monotonic()
    say = speaker(console, started)
    base, data = model_and_data(folder, say)
    located = {
        "model.base": base,
        "data.sources.0.path": data / "instruction.jsonl",
        "data.sources.1.path": data / "scored.jsonl",
        "data.held_out.0.path": data / "held_out.jsonl",
        "data.held_out.1.path": data / "held_out_scored.jsonl",
        "output": folder / "quickstart",
    }
    settings = load_settings("quickstart", (*as_overrides(located), *overrides))
    base = Path(settings.model.base)
    tasks = read_tasks(data / "held_out.jsonl")
    before = _answers_of_the_base(base, tasks, data / "base_answers.json", console, say)
    train_or_go_on(settings, train, say)
    _measure(settings.output, before, tasks, started, console, say)


def run_online(folder: Path, overrides: tuple[str, ...], *, console: Console, train: Callable[..., None]) -> None:
    """A few steps on right answers, until the form is right; then online steps, measured before and after.

    Arguments, an interrupted quickstart, and errors are as for `run_quickstart`.

    Args:
        overrides: of the recipe `quickstart_online`.
    """
    started = time.monotonic()
    say = speaker(console, started)
    base, data = model_and_data(folder, say)
    held_out = {"model.base": base, "data.held_out.0.path": data / "held_out.jsonl"}
    of_start = {"data.sources.0.path": data / "instruction.jsonl", "output": folder / "quickstart_online_start"}
    settings_of_start = load_settings("quickstart_sft", as_overrides(held_out | of_start))
    located = {
        "data.sources.0.path": data / "instruction.jsonl",
        "data.sources.1.path": data / "scored.jsonl",
        "data.held_out.1.path": data / "held_out_scored.jsonl",
        "start.adapter": settings_of_start.output,
        "output": folder / "quickstart_online",
    }
    settings = load_settings("quickstart_online", (*as_overrides(held_out | located), *overrides))
    tasks = read_tasks(data / "held_out.jsonl")
    train_or_go_on(settings_of_start, train, say)
    say(f"the model that the online steps start from answers {len(tasks)} held-out prompts")
    before = answers_of(merged_of(settings_of_start.output, say)[0], tasks, console)
    train_or_go_on(settings, train, say)
    _measure(settings.output, before, tasks, started, console, say)


def _measure(
    run: Path,
    before: Sequence[Answer],
    tasks: tuple[Task, ...],
    started: float,
    console: Console,
    say: Callable[[str], None],
) -> None:
    """Merge a run's policy, let it answer the tasks, and store and show what has changed; raises as `finish`."""
    merged, share_kept = merged_of(run, say)
    say(f"the trained model answers the same {len(tasks)} prompts")
    after = answers_of(merged, tasks, console)
    result = compared(before, after, time.monotonic() - started) | {"share_kept_by_merging": share_kept}
    finish(console, before, after, result, run)


def speaker(console: Console, started: float) -> Callable[[str], None]:
    """Prints lines with the seconds since `started`, by the monotonic clock."""

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {text}", highlight=False, markup=False)

    return say


def model_and_data(folder: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """The folders of the quickstart's model, which may be fetched first, and of its data, which are written."""
    disable_progress_bar()  # transformers' own bar for each load
    data = folder / "quickstart-data"
    write(data)  # before the download: it may be that nothing can be written there
    base = quickstart_model(say=say)
    say(f"model in {base}; data in {data}")
    return base, data


def as_overrides(paths: Mapping[str, Path]) -> tuple[str, ...]:
    """`key=path` of each. A JSON string is valid YAML: a path is quoted because it may contain a colon or a hash."""
    return tuple(f"{key}={json.dumps(str(path))}" for key, path in paths.items())


def train_or_go_on(settings: Settings, train: Callable[..., None], say: Callable[[str], None]) -> None:
    """Train a run, or go on with one of the same recipe that was interrupted.

    Args:
        train: as for `run_quickstart`.
    Raises:
        UserError: what was interrupted cannot go on.
    """
    run, goes_on = settings.output, _is_unfinished(settings)
    say(f"training {settings.train.steps} steps{': the run that was interrupted goes on' if goes_on else ''}")
    if not goes_on:
        (run / RESULT).unlink(missing_ok=True)  # until the end this run is the one that is not finished
    try:
        train(settings, overwrite=not goes_on, resume=goes_on)
    except UserError as error:
        if not goes_on:
            raise
        raise UserError(f"{error}\nto train anew, delete {run}") from None


def merged_of(run: Path, say: Callable[[str], None]) -> tuple[Path, float]:
    """The run's policy as a model of its own, and the share of what was trained that the merge has kept."""
    merged = run / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    with ended_as_by_ctrl_c():
        agreement = convert_to_merged(run, merged, say=say).agreement
    assert agreement is not None
    return merged, agreement.share_kept


def _is_unfinished(settings: Settings) -> bool:
    """Whether the output holds a run of this recipe whose quickstart did not come to its end."""
    folder = RunFolder(settings.output)
    if (folder.path / RESULT).exists() or not all(
        path.exists() for path in (folder.lock, folder.recipe, folder.environment)
    ):
        return False
    return all(may_change(key) for key in recipe_changes(folder, located(settings)))


def _answers_of_the_base(
    base: Path, tasks: tuple[Task, ...], kept: Path, console: Console, say: Callable[[str], None]
) -> list[Answer]:
    """The base's answers, which are taken from the file `kept` if it has them, and stored there otherwise."""
    check_model_folder(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"
    files = {path.name: sha256(path) for path in sorted(base.iterdir()) if path.is_file()}
    depends_on = {"model": files, "prompts": [task.prompt for task in tasks], "tokens": MAX_NEW_TOKENS, "on": on}
    try:
        stored = json.loads(kept.read_text(encoding="utf-8"))
        responses = stored["responses"] if stored["depends_on"] == depends_on else None
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        responses = None
    if isinstance(responses, list) and len(responses) == len(tasks) and all(isinstance(one, str) for one in responses):
        say(f"the base model has answered the {len(tasks)} held-out prompts before: {kept}")
        return graded(tasks, responses)
    say(f"the base model answers {len(tasks)} held-out prompts")
    answers = answers_of(base, tasks, console)
    content = {"depends_on": depends_on, "responses": [answer.response for answer in answers]}
    write_atomically(kept, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return answers
