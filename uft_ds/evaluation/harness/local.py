"""Tasks whose questions lie in a folder: which files they are, and the task files that send the harness there.

A task file includes the harness's own and changes where the rows come from, so prompts and metrics stay as they are.
The harness takes it in place of its own of the same name, also inside groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from uft_ds.errors import UserError
from uft_ds.evaluation.harness import package
from uft_ds.evaluation.harness.layouts import LAYOUTS, Layout
from uft_ds.evaluation.harness.suites import AskedTask
from uft_ds.host.files import sha256


@dataclass(frozen=True)
class LocalTask:
    """A task with its rows: files by split, the split of the questions, and the harness's own file of it.

    given: the name that was asked for, its own or a group's.
    """

    name: str
    given: str
    own_file: Path
    files: Mapping[str, Path]
    asked: str
    changes: Mapping[str, None]
    layout: Layout

    def write(self, folder: Path) -> None:
        """Write the task file that sends the harness to the rows."""
        tree = {
            "include": str(self.own_file),
            "task": self.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in self.files.items()}},
            **self.changes,
        }
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def local_tasks(data: Path, asked: Iterable[AskedTask]) -> list[LocalTask]:
    """Those of the tasks that the folder has rows of. The others come from the hub.

    Raises:
        UserError: the folder does not exist, has rows of none of the tasks, or lacks a file that a task needs.
    """
    if not data.is_dir():
        raise UserError(f"--data: {data}: no such folder")
    asked = tuple(asked)
    found = [task for one in asked for task in _tasks_of(data.resolve(), one)]
    if not found:
        names = list(dict.fromkeys(one.task for one in asked))
        lines = [f"  {name}: {looked_for(name)}" for name in names]
        raise UserError("\n".join([f"--data: {data} holds rows of none of the tasks {', '.join(names)}", *lines]))
    return found


_FILES_NAMED = 6
"""MMLU has two files for each of 57 subjects."""


def looked_for(name: str) -> str:
    """The files that a data folder without any row of a task lacks, in words. name: of a task or a group."""
    of_all = (_file_names(layout, tree).values() for layout, _, tree in _own_files(name))
    files = list(dict.fromkeys(file for of_task in of_all for file in of_task))
    if not files:
        return "nothing was looked for, as the layout of its files is not known; give the path of a task file instead"
    more = f" and {len(files) - _FILES_NAMED} more" if len(files) > _FILES_NAMED else ""
    return f"looked for {', '.join(files[:_FILES_NAMED])}{more}, of which none is there"


def has_another_split(name: str, split: str) -> bool:
    """Whether the questions of a task are those that a data folder had in place of the harness's."""
    return any(_own_files(name, (layout for layout in LAYOUTS if split in layout.asked[1:])))


def content(tasks: Iterable[LocalTask], data: Path) -> dict[str, str]:
    """The SHA-256 of each file that is read, by its name below the data folder."""
    paths = sorted({path for task in tasks for path in task.files.values()})
    return {str(path.relative_to(data.resolve())): sha256(path) for path in paths}


def _tasks_of(data: Path, one: AskedTask) -> list[LocalTask]:
    """The task, or all tasks of the group; none if the folder has no rows of any of them."""
    own = list(_own_files(one.task))
    if not any((data / file).exists() for layout, _, tree in own for file in _file_names(layout, tree).values()):
        return []
    return [_local_task(data, one, layout, own_file, tree) for layout, own_file, tree in own]


def _local_task(data: Path, one: AskedTask, layout: Layout, own_file: Path, tree: Mapping[str, Any]) -> LocalTask:
    name, names = str(tree.get("task")), _file_names(layout, tree)
    there = {split: data / file for split, file in names.items() if (data / file).is_file()}
    questions = next((split for split in layout.asked if split in there), None)
    if questions is None:
        raise UserError(f"--data: {data / names[layout.asked[0]]}: no such file; {name} takes its questions from there")
    changes: dict[str, None] = {}
    if questions != layout.asked[0]:
        changes[f"{layout.asked[0]}_split"] = None
    if layout.examples is not None and layout.examples not in there:
        if one.shots:
            raise UserError(
                f"--data: {data / names[layout.examples]}: no such file; {name} takes the {one.shots} examples of "
                f"each prompt from there; bring it, or ask for none with --suite {name}=0"
            )
        changes |= {"training_split": None, "fewshot_split": None}
    if "validation" in names and "validation" not in there:
        changes["validation_split"] = None  # where there are no examples, the harness reads it
    return LocalTask(name, one.task, own_file, there, questions, changes, layout)


def _own_files(name: str, layouts: Iterable[Layout] = LAYOUTS) -> Iterator[tuple[Layout, Path, dict[str, Any]]]:
    """The harness's files of a task, or of the tasks of a group, and what they hold."""
    for layout in layouts:
        for own_file in sorted((package.root() / "tasks").glob(layout.task_files)):
            text = own_file.read_text(encoding="utf-8")
            if name not in text and name not in layout.groups:
                continue  # before the reading as YAML, which takes milliseconds
            tree = package.read_task_file(own_file)
            if name in (tree.get("task"), _subgroup(tree)) or name in layout.groups:
                yield layout, own_file, tree


def _subgroup(tree: Mapping[str, Any]) -> str:
    """The group of a part of MMLU, such as mmlu_stem, whose tasks the harness finds by a tag."""
    return str(tree.get("tag")).removesuffix("_tasks")


def _file_names(layout: Layout, tree: Mapping[str, Any]) -> dict[str, str]:
    subset = {"subset": tree.get("dataset_name"), "task": tree.get("task")}
    return {split: file.format(**subset) for split, file in layout.files.items()}
