"""The `uft` command: collects the subcommands of `commands/` and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from uft_ds import __version__
from uft_ds.commands import checkpoint, data, machine, model, recipe, training
from uft_ds.errors import EXIT_BAD_INPUT, CheckFailed, UserError
from uft_ds.host.terminal import visible

app = typer.Typer(
    help="One-stage fine-tuning (UFT) of large language models on DeepSpeed ZeRO-3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    training.train,
    training.status,
    training.sweep,
    training.reference,
    model.convert,
    machine.plan,
    model.chat,
    training.quickstart,
    machine.doctor,
):
    app.command()(command)
for name, group in (("recipe", recipe.app), ("data", data.app), ("checkpoint", checkpoint.app)):
    app.add_typer(group, name=name)


def _version(asked: bool) -> None:
    if asked:
        print(f"uft_ds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of `uft` itself."""


def main() -> None:
    """Run the command and end the process with its exit code; errors of the user's input show no traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)  # between the libraries that we use; a user cannot fix them
    try:
        app()
    except (UserError, CheckFailed) as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        # Wherever a path of the user's is looked at: pathlib answers other impossible paths by "does not exist".
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename or "")
        begins = name if len(name) <= 80 else f"{name[:80]}..."
        longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
        _end(
            f"{begins}: no such file or folder, and none can be made ({error.strerror}: {longest} bytes in one name, "
            f"{len(os.fsencode(name))} in all; file systems take 255, and 4096)",
            EXIT_BAD_INPUT,
        )


def _end(message: str, code: int) -> None:
    print(f"error: {visible(message)}", file=sys.stderr)
    sys.exit(code)
