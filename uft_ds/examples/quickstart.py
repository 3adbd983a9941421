"""`uft quickstart`: train a small real model on generated verifiable data, and measure it before and after."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.generate import check_model_folder, generate_responses, load_for_generation
from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.examples.verifiable import Task, grade, is_correct, read_tasks, write
from uft_ds.export.convert import convert_to_merged
from uft_ds.host.files import sha256, write_atomically
from uft_ds.host.process import ended_as_by_ctrl_c
from uft_ds.recipe.settings import Settings, load_settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.identity import may_change
from uft_ds.run.resume import recipe_changes
from uft_ds.run.settings import located

MAX_NEW_TOKENS = 32
RESULT = "quickstart.json"
"""File in the run's folder with all answers; a quickstart that has not written it is not finished."""


@dataclass(frozen=True)
class Answer:
    """A model's response to a held-out task, graded by the rule that gave the training scores."""

    kind: str
    prompt: str
    expected: str
    response: str
    grade: float
    correct: bool


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

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {text}", highlight=False, markup=False)

    disable_progress_bar()  # transformers' own bar for each load
    data = folder / "quickstart-data"
    write(data)  # before the download: it may be that nothing can be written there
    base = quickstart_model(say=say)
    say(f"model in {base}; data in {data}")
    located = {
        "model.base": base,
        "data.sources.0.path": data / "instruction.jsonl",
        "data.sources.1.path": data / "scored.jsonl",
        "data.held_out.0.path": data / "held_out.jsonl",
        "output": folder / "quickstart",
    }
    # A JSON string is valid YAML: paths are quoted because they may contain a colon or a hash.
    settings = load_settings(
        "quickstart", (*(f"{key}={json.dumps(str(path))}" for key, path in located.items()), *overrides)
    )
    base, run = Path(settings.model.base), settings.output
    tasks = read_tasks(data / "held_out.jsonl")
    before = _answers_of_the_base(base, tasks, data / "base_answers.json", console, say)
    goes_on = _is_unfinished(settings)
    say(f"training {settings.train.steps} steps{': the run that was interrupted goes on' if goes_on else ''}")
    if not goes_on:
        (run / RESULT).unlink(missing_ok=True)  # until the end this run is the one that is not finished
    try:
        train(settings, overwrite=not goes_on, resume=goes_on)
    except UserError as error:
        if not goes_on:
            raise
        raise UserError(f"{error}\nto train anew, delete {run}") from None
    merged = run / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    with ended_as_by_ctrl_c():
        agreement = convert_to_merged(run, merged, say=say).agreement
    assert agreement is not None
    say(f"the trained model answers the same {len(tasks)} prompts")
    after = _answers(merged, tasks, console)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {
        "held_out_prompts": len(tasks),
        "correct_before": sum(answer.correct for answer in before),
        "correct_after": sum(answer.correct for answer in after),
        "mean_grade_before": sum(answer.grade for answer in before) / len(tasks),
        "mean_grade_after": sum(answer.grade for answer in after) / len(tasks),
        "share_kept_by_merging": agreement.share_kept,
        "seconds": round(seconds),
        "peak_memory_gib": _peak_gib(),
        "before": [asdict(answer) for answer in before],
        "after": [asdict(answer) for answer in after],
    }
    write_atomically(run / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _show(console, before, after, result, run)
    if not result["mean_grade_after"] > result["mean_grade_before"]:
        raise CheckFailed(f"the verified held-out score did not rise; see {run / 'quickstart.json'}")


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
        return _graded(tasks, responses)
    say(f"the base model answers {len(tasks)} held-out prompts")
    answers = _answers(base, tasks, console)
    content = {"depends_on": depends_on, "responses": [answer.response for answer in answers]}
    write_atomically(kept, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return answers


def _answers(model_folder: Path, tasks: tuple[Task, ...], console: Console) -> list[Answer]:
    model, tokenizer = load_for_generation(model_folder)
    prompts = [[{"role": "user", "content": task.prompt}] for task in tasks]
    columns = (TextColumn("answering"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answering", total=len(prompts))

        def answered(count: int) -> None:
            progress.advance(bar, count)
            if not console.is_terminal:
                console.print(f"  {int(progress.tasks[bar].completed)}/{len(prompts)} answered")

        responses = generate_responses(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, on_batch=answered)
    return _graded(tasks, responses)


def _graded(tasks: tuple[Task, ...], responses: list[str]) -> list[Answer]:
    return [
        Answer(task.kind, task.prompt, task.answer, response, grade(task, response), is_correct(task, response))
        for task, response in zip(tasks, responses, strict=True)
    ]


def _peak_gib() -> dict[str, float]:
    """Peak memory in GiB of this process, and of its largest child process (a rank)."""
    usage = {"this_process": resource.RUSAGE_SELF, "largest_rank": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(who).ru_maxrss / 2**20, 2) for name, who in usage.items()}


def _show(console: Console, before: list[Answer], after: list[Answer], result: dict[str, Any], run: Path) -> None:
    samples = Table("prompt", "before", "after", title="samples, never trained on", show_lines=True)
    shown: set[str] = set()
    for old, new in zip(before, after, strict=True):
        if new.kind not in shown and len(shown) < 5:
            shown.add(new.kind)
            samples.add_row(Text(old.prompt), Text(old.response), Text(new.response))
    console.print(samples)
    kinds = Table("kind", "before", "after", title="verified answers on held-out prompts")
    for kind in sorted({answer.kind for answer in before}):
        counts = [[a.correct for a in answers if a.kind == kind] for answers in (before, after)]
        kinds.add_row(kind, *(f"{sum(c)}/{len(c)}" for c in counts))
    total = result["held_out_prompts"]
    kinds.add_row("all", f"{result['correct_before']}/{total}", f"{result['correct_after']}/{total}", style="bold")
    grades = (f"{result['mean_grade_before']:.2f}", f"{result['mean_grade_after']:.2f}")
    kinds.add_row("mean grade", *grades, style="bold")
    console.print(kinds)
    minutes, rest = divmod(result["seconds"], 60)
    memory = result["peak_memory_gib"]
    made = Table.grid(padding=(0, 2))
    for name, path in (
        ("the run", run),
        ("curves", run / "curves.png"),
        ("report", run / "report.html"),
        ("the merged model", run / "merged"),
        ("all answers", run / RESULT),
    ):
        made.add_row(name, str(path))
    made.add_row("time", f"{minutes} min {rest} s; peak memory of a rank {memory['largest_rank']} GiB")
    console.print(made)
    if result["mean_grade_after"] > result["mean_grade_before"]:
        console.print(
            f"It worked: of {total} prompts that it never saw, {result['correct_after']} are answered exactly right "
            f"({result['correct_before']} before).",
            highlight=False,
        )
    command = "uft" if shutil.which("uft") else sys.argv[0]  # `make quickstart` activates no environment
    console.print(f'Talk to it:  {command} chat {run / "merged"} --prompt "..."', highlight=False)
