"""`uft eval` asks a model the questions of benchmarks, by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from uft_ds.commands.shared import console, quiet_loading, stopped_in_words
from uft_ds.errors import UserError
from uft_ds.host.process import die_with_parent
from uft_ds.host.world import launcher_environment

if TYPE_CHECKING:
    from uft_ds.evaluation.harness.model import Agreed
    from uft_ds.evaluation.harness.planned import Backend
    from uft_ds.evaluation.harness.suites import Suite
    from uft_ds.evaluation.harness.tasks import Loaded, Options
    from uft_ds.evaluation.results import Evaluation
    from uft_ds.export.unmerged import Unmerged

_SEEDS = (0, 1234, 1234, 1234)
"""As lm-evaluation-harness's own command takes them."""
_MODEL, _TASKS, _MACHINE, _SERVER = "Model", "Questions", "Machine", "Server"


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run, a checkpoint, a PEFT adapter, a model's folder, a hub name.")
    ],
    suite: Annotated[
        str,
        typer.Option(help="leaderboard, openllm, quick, or tasks of lm-evaluation-harness: gsm8k,arc_challenge=25."),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option(help="Folder of the results; in RUN/evaluations, or in evaluations here, if not given."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an evaluation with other settings that is at --out.")
    ] = False,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only the first questions of each task; 100 for quick.", rich_help_panel=_TASKS),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A folder with the rows, so that no hub is needed.", rich_help_panel=_TASKS),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(help="Ask by the model's chat template. The paper did not.", rich_help_panel=_TASKS),
    ] = False,
    multiturn: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            help="With the template, examples are turns of the conversation; so if not said.", rich_help_panel=_TASKS
        ),
    ] = None,
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Of any answer; the tasks' own limits if not given.", rich_help_panel=_TASKS),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            max=2**32 - 1,  # numpy's
            help="For all generators; the harness's 0,1234,1234,1234 if not given.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The base, where the source does not say it or it has moved.", rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        Optional[Literal["float32", "bfloat16", "float16"]],  # noqa: UP045
        typer.Option(help="bfloat16 on a GPU and float32 on a CPU if not given.", rich_help_panel=_MODEL),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Rows answered together; what fits if not given.", rich_help_panel=_MACHINE),
    ] = None,
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A server with OpenAI's completions that has the source.", rich_help_panel=_SERVER),
    ] = None,
    served_as: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Its name there.", rich_help_panel=_SERVER),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the questions, one a GPU.", rich_help_panel=_MACHINE)
    ] = 1,
) -> None:
    """Measure a model on benchmarks by lm-evaluation-harness, with the paper's shots and metrics.

    An adapter is evaluated on its base without merging. Interrupted in any way, the same command goes on where it
    stopped. Exit codes: 0 done, 2 bad input, 3 the hub or another process is lost, 130 stopped by a signal.
    """
    from uft_ds.evaluation.harness import package
    from uft_ds.evaluation.harness.suites import suite_of

    world = launcher_environment()
    if world.rank:
        die_with_parent()
    package.check_is_there()
    package.quiet()
    asked = suite_of(suite)
    if multiturn and not chat_template:
        raise UserError("--multiturn: turns of a conversation need a template; add --chat-template, or leave it out")
    if world.world_size > 1 and processes not in (1, world.world_size):
        raise UserError(
            f"--processes: {processes} given, but the launcher has started {world.world_size}; leave it out"
        )
    if (url is None) != (served_as is None):
        raise UserError("--url and --served-as: a server and the model's name there; give both, or none of them")
    if url is not None and (dtype is not None or processes > 1 or world.world_size > 1):
        raise UserError("--url: the server computes, so --dtype and --processes mean nothing; leave them out")
    import torch

    from uft_ds.evaluation.harness.batches import BatchSize
    from uft_ds.evaluation.harness.ranks import check_count
    from uft_ds.evaluation.harness.tasks import Options
    from uft_ds.export.unmerged import opened_unmerged

    quiet_loading()
    check_count(processes, torch.cuda.device_count())
    options = Options(
        limit=limit or asked.limit,
        chat_template=chat_template,
        multiturn=chat_template and multiturn is not False,
        seeds=_SEEDS if seed is None else (seed, seed, seed, seed),
        dtype="the server's" if url is not None else dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        max_new_tokens=max_new_tokens,
        size=None if batch_size is None else BatchSize(rows=batch_size),
        server=None if url is None or served_as is None else (url, served_as),
    )
    say = console.print if world.rank == 0 else _say_nothing
    with opened_unmerged(source, base, say) as model:
        if chat_template and model.tokenizer.chat_template is None:
            raise UserError(f"--chat-template: {source} has none; leave --chat-template out")
        folder = out or _default_folder(model, asked, options)
        with stopped_in_words(f"what was answered is kept in {folder}"):
            found = _evaluated(model, asked, options, data, folder, processes, overwrite)
    if found is not None:
        _show(found, folder)


def _evaluated(
    model: Unmerged,
    suite: Suite,
    options: Options,
    data: Path | None,
    folder: Path,
    processes: int,
    overwrite: bool,
) -> Evaluation | None:
    """The evaluation; None on another rank than the first."""
    import torch

    from uft_ds.evaluation.harness.folder import begin, has_ended
    from uft_ds.evaluation.harness.planned import Place
    from uft_ds.evaluation.harness.ranks import beating, started, watch
    from uft_ds.evaluation.harness.run import begun_of
    from uft_ds.evaluation.harness.run import evaluate as run
    from uft_ds.evaluation.harness.shown import shown_progress
    from uft_ds.evaluation.harness.tasks import loaded_tasks

    world = launcher_environment()
    is_first = world.rank == 0
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    with ExitStack() as stack:
        tasks = stack.enter_context(loaded_tasks(suite, data, options))
        begun = begun_of(model, suite, tasks, options)
        place = Place(world.rank, world.world_size)
        if is_first:
            stack.enter_context(_locked(folder))
            ended = begin(folder, begun, overwrite=overwrite)
            if ended is not None:
                console.print(f"complete before: {folder}; nothing to do")
                return ended
            if world.world_size > 1:
                place = Place(0, world.world_size, watch(begun.answers(folder), world.world_size))
            elif processes > 1:
                place = stack.enter_context(started(processes, folder))
        elif has_ended(folder, begun):
            return None
        else:
            stack.enter_context(beating(begun.answers(folder), world.rank))
        if place.size > 1 and device.type == "cpu":
            _share_cores(world.ranks_per_node or place.size)
        on_answered = stack.enter_context(shown_progress(console)) if is_first else _say_nothing
        return run(
            model.name,
            begun,
            folder,
            tasks,
            options,
            backend=partial(_backend, model, options, tasks, device),
            place=place,
            on_answered=on_answered,
        )


def _backend(model: Unmerged, options: Options, tasks: Loaded, device: Any, agreed: Agreed) -> Backend:
    """What answers: the model in this process, or a server."""
    import torch

    from uft_ds.evaluation.harness.model import CausalModel

    if options.server is None:
        loaded = model.load(getattr(torch, options.dtype), device)
        return CausalModel(loaded, model.tokenizer, options.size, agreed, has_template=options.chat_template)
    from uft_ds.evaluation.harness.endpoint import ROWS, EndpointModel

    url, name = options.server
    rows = ROWS if options.size is None or options.size.rows is None else options.size.rows
    found = EndpointModel(
        url, name, model.tokenizer, positions=model.positions(), rows=rows, has_template=options.chat_template
    )
    found.check_scores_prompts(
        name for name, task in tasks.as_asked["tasks"].items() if task.OUTPUT_TYPE != "generate_until"
    )
    return found


def _share_cores(processes: int) -> None:
    import os

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _default_folder(model: Unmerged, suite: Suite, options: Options) -> Path:
    parts = [suite.name, None if model.step is None else f"step{model.step}"]
    parts += [
        "chat" if options.chat_template else None,
        None if options.limit == suite.limit else f"limit{options.limit}",
    ]
    name = "-".join(part for part in parts if part is not None)
    if model.run is not None:
        return model.run / "evaluations" / name
    return Path("evaluations") / f"{model.name}-{name}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other `uft eval` writes into the folder.

    Raises:
        UserError: another one does.
    """
    from uft_ds.host.locks import Held, acquire

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder.with_name(f".{folder.name}.lock"), needs_locks=False)
    except Held:
        raise UserError(f"--out: {folder}: another evaluation is writing it; wait for its end") from None
    except OSError as error:
        raise UserError(f"--out: {folder}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.delete()


def _show(found: Evaluation, folder: Path) -> None:
    from uft_ds.evaluation.harness.shown import in_words, tables

    for line in in_words(found):
        console.print(line)
    for table in tables(found, folder):
        console.print(table)
    console.print(f"results: {folder}")


def _say_nothing(*anything: Any) -> None:
    pass
