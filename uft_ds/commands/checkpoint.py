"""`uft checkpoint`: list, verify and delete a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uft_ds.commands.shared import console
from uft_ds.errors import CheckFailed

app = typer.Typer(help="Look at a run's checkpoints, check and delete them.", no_args_is_help=True)


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")]


@app.command("ls")
def checkpoint_ls(run: RunPath) -> None:
    """List the checkpoints, the newest first: step, size, and whether the files are as they were written."""
    from uft_ds.checkpoint.listing import listed

    console.print(listed(run))


@app.command("verify")
def checkpoint_verify(run: RunPath) -> None:
    """Read every file and compare it with the manifest; exit code 3 if one is not as it was written."""
    from uft_ds.checkpoint.listing import problems_of

    problems = problems_of(run)
    if problems:
        raise CheckFailed("\n".join(problems))
    console.print("every file is as it was written")


@app.command("rm")
def checkpoint_rm(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    steps: Annotated[list[int], typer.Argument(metavar="STEP...", help="Steps of the checkpoints to delete.")],
) -> None:
    """Delete checkpoints, and repair the link to the newest one."""
    from uft_ds.checkpoint.listing import delete

    for checkpoint in delete(run, steps):
        console.print(f"deleted: {checkpoint}")
