"""Load the tasks of a suite: from lm-evaluation-harness's own files, with rows of the hub or of a folder."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.harness import local, package, punkt
from uft_ds.evaluation.harness.batches import BatchSize
from uft_ds.evaluation.harness.content import content_of
from uft_ds.evaluation.harness.prepared import check_examples, pin_rows, rows_mapped_anew, seed, shorten
from uft_ds.evaluation.harness.rows import check_rows
from uft_ds.evaluation.harness.suites import Suite
from uft_ds.host.hub import is_offline
from uft_ds.host.packages import install_command
from uft_ds.host.terminal import in_one_line

_FOLDER_OF = {"mmlu": "mmlu/default"}
"""Where the harness keeps tasks of this first word, if not in a folder of that name."""


OWN_FILE = "its task file's"
"""Where the rows of a task come from that was given by the path of its file."""


@dataclass(frozen=True)
class Options:
    """What is asked of a model beyond the tasks themselves.

    limit: questions of each task; None: all. multiturn: whether examples are turns of a conversation, which only a chat
    template can write. seeds: of Python's, numpy's and torch's generators, and of the examples in prompts.
    max_new_tokens: of any answer; None: as the tasks say. size: of batches; None: what the machine holds.
    server: URL and name of a model on a server; None: it is loaded here.
    """

    limit: int | None
    chat_template: bool
    multiturn: bool
    seeds: tuple[int, int, int, int]
    dtype: str
    max_new_tokens: int | None = None
    size: BatchSize | None = None
    server: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rows:
    """Where the questions of a suite's tasks come from.

    sources: by task, the split of its questions, for tasks whose rows lie in a folder; `OWN_FILE` for tasks by path;
    else "hub". content: hashes of the folder's files.
    """

    sources: Mapping[str, str]
    content: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """The tasks of a suite, as the harness's `evaluate` takes them.

    as_asked: by the harness's names, tasks and groups. shots, versions, content: of each task; content as `content_of`.
    """

    as_asked: Any
    rows: Rows
    shots: Mapping[str, int]
    versions: Mapping[str, str]
    content: Mapping[str, str]


@contextmanager
def loaded_tasks(suite: Suite, data: Path | None, options: Options) -> Iterator[Loaded]:
    """The tasks, ready to be evaluated once. Rows are read within the block.

    Args:
        data: a folder with rows; None: all rows come from the hub, or from its cache.
    Raises:
        UserError: a task does not exist, its rows are not there, or a package that it needs is missing.
        CheckFailed: the hub cannot be reached.
    """
    package.quiet()
    with tempfile.TemporaryDirectory() as folder, rows_mapped_anew():
        local_tasks = local.local_tasks(data, suite.asked) if data is not None else []
        names = [asked.task for asked in suite.asked]
        if any(name in punkt.TASKS for name in names):
            punkt.provide(data)
        check_rows(local_tasks)
        for task in local_tasks:
            task.write(Path(folder))
        in_data = {name: f"--data {data}" for task in local_tasks for name in (task.name, task.given)}
        found, own_files = _read(suite, Path(folder), in_data, data)
        shots = {name: int(task.get_config("num_fewshot") or 0) for name, task in found["tasks"].items()}
        for name, task in found["tasks"].items():
            explained(name, partial(pin_rows, task, options.seeds), own_files.get(name) or in_data.get(name), data)
            check_examples(name, task, shots[name])
            task.set_fewshot_seed(seed=options.seeds[3])
            if options.max_new_tokens is not None:
                shorten(task, options.max_new_tokens)
        seed(options.seeds)
        sources = dict.fromkeys(own_files, OWN_FILE) | {task.name: task.asked for task in local_tasks}
        yield Loaded(
            found,
            Rows(
                {name: sources.get(name, "hub") for name in shots},
                local.content(local_tasks, data) if data is not None else {},
            ),
            shots,
            {name: str(task.VERSION) for name, task in found["tasks"].items()},
            {name: content_of(task, shots[name], own_files.get(name)) for name, task in found["tasks"].items()},
        )


def _read(suite: Suite, folder: Path, local_rows: Mapping[str, str], data: Path | None) -> tuple[Any, dict[str, Path]]:
    """What the harness's task manager makes of the suite, with its shots; and the own file of each task by path.

    Args:
        folder: of the task files that send the harness to rows in `data`.
        local_rows: where the rows of tasks lie that are in `data`, in words.
    """
    from lm_eval.tasks import TaskManager

    names = [asked.task for asked in suite.asked]
    manager = TaskManager(include_defaults=False, include_path=[*_folders_of(names), folder])
    further = [name for name in names if name not in manager.task_index and not name.endswith(".yaml")]
    if further:
        _check_are_known(further)
        manager = TaskManager(include_path=[folder])  # reads all task files of the harness: ten seconds
    parts = []
    own_files: dict[str, Path] = {}
    for asked in suite.asked:
        is_path = asked.task not in manager.task_index and asked.task.endswith(".yaml")
        if asked.task not in manager.task_index and not is_path:
            raise _unknown(asked.task, manager.all_tasks)
        if is_path and not Path(asked.task).expanduser().is_file():
            raise UserError(f"--suite: {asked.task}: no such file; expected a task file of lm-evaluation-harness")
        own = Path(asked.task) if is_path else None
        found = explained(asked.task, partial(manager.load, [asked.task]), own or local_rows.get(asked.task), data)
        for name, task in found["tasks"].items():
            if own is not None:
                own_files[name] = own
            if asked.shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=asked.shots or 0)
        parts.append(found)
    twice = [name for place, part in enumerate(parts) for name in part["tasks"] for other in parts[:place]
             if name in other["tasks"]]  # fmt: skip
    if twice:
        raise UserError(f"--suite: {twice[0]} is asked twice, in two groups; name one of them")
    of_all = {key: {name: one for part in parts for name, one in part[key].items()} for key in ("tasks", "groups")}
    return of_all, own_files


def _folders_of(names: list[str]) -> list[Path]:
    """The harness's folders that have these tasks by their first word, as far as there are any."""
    words = {name.partition("_")[0] for name in names}
    found = [package.root() / "tasks" / _FOLDER_OF.get(word, word) for word in sorted(words)]
    return [folder for folder in found if folder.is_dir()]


def _check_are_known(names: list[str]) -> None:
    """Refuse names that stand in no task file of the harness, which is found in a fraction of a second.

    Raises:
        UserError: names the first one, and similar ones.
    """
    texts = [path.read_bytes() for path in (package.root() / "tasks").rglob("*.yaml")]
    for name in names:
        if not any(name.encode() in text for text in texts):
            of_all = (re.findall(rb"^\"?(?:task|group)\"?: *\"?([\w-]+)", text, re.M) for text in texts)
            raise _unknown(name, {found.decode() for of_file in of_all for found in of_file})


def _unknown(name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return UserError(f"--suite: lm-evaluation-harness has no task {name!r}{hint}")


def explained(name: str, load: Callable[[], Any], source: Path | str | None = None, data: Path | None = None) -> Any:
    """Load a task's rows; say what to do where they cannot be had.

    Args:
        source: the task's own file, or where its rows lie, in words; None: they come from the hub.
        data: the folder in which rows were looked for before; None: no folder was given.
    Raises:
        UserError, CheckFailed: as `loaded_tasks`.
    """
    try:
        return load()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: needs the package {error.name}, which is not installed; the extra uft_ds[eval] brings it: "
            f"{install_command('eval')}"
        ) from None
    except Exception as error:  # noqa: BLE001 - datasets and the hub's client raise many types
        reason = in_one_line(str(error), 300) or type(error).__name__
        if isinstance(source, str):
            raise UserError(f"{name}: {source}: its rows cannot be asked ({reason}); correct them") from None
        if isinstance(source, Path) and not _is_of_network(error):
            offline = "; HF_HUB_OFFLINE forbids to fetch rows of the hub" if is_offline() else ""
            raise UserError(
                f"--suite: {source}: the task, or its rows, cannot be read ({reason}); correct them{offline}"
            ) from None
        where = "" if data is None else f"its rows are not in --data {data}: {local.looked_for(name)}\n{name}: "
        remedy = "give --data a folder with the rows" if data is None else "put the files there"
        if is_offline():
            raise UserError(
                f"{name}: {where}its rows are not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch them "
                f"({reason}); {remedy}, or run it once with a network"
            ) from None
        if _is_of_network(error):
            raise CheckFailed(
                f"{name}: {where}the hub cannot be reached ({reason}); the same command goes on"
            ) from None
        raise UserError(f"{name}: {where}its rows cannot be loaded from the hub ({reason}); {remedy}") from None


def _is_of_network(error: BaseException | None) -> bool:
    """Whether a lost connection is the reason, or the reason's reason."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _OF_NETWORK:
            return True
        error = error.__cause__ or error.__context__
    return False


_OF_NETWORK = {"ConnectError", "ConnectTimeout", "ReadTimeout", "NetworkError", "LocalEntryNotFoundError"}
