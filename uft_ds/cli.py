"""The `uft` command: collects the subcommands of `commands/` and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from uft_ds import __version__
from uft_ds.commands import (
    benchmarks,
    checkpoint,
    comparison,
    data,
    evaluation,
    machine,
    model,
    recipe,
    scoring,
    training,
)
from uft_ds.errors import EXIT_BAD_INPUT, CheckFailed, UserError
from uft_ds.host.faults import ending
from uft_ds.host.hub import tell_retries_once
from uft_ds.host.library_warnings import quiet_bitsandbytes
from uft_ds.host.standard_streams import prepare_streams
from uft_ds.host.terminal import as_typed, visible

app = typer.Typer(
    help="One-stage fine-tuning (UFT) of large language models on DeepSpeed ZeRO-3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_PANELS: Mapping[str, Mapping[str, Callable[..., None] | typer.Typer]] = {
    "Begin": {"quickstart": training.quickstart, "doctor": machine.doctor},
    "Train": {
        "recipe": recipe.app,
        "plan": machine.plan,
        "train": training.train,
        "status": training.status,
        "reference": training.reference,
        "sweep": training.sweep,
        "checkpoint": checkpoint.app,
    },
    "Data and scores": {"data": data.app, "score": scoring.score},
    "The result": {
        "convert": model.convert,
        "chat": model.chat,
        "eval": evaluation.evaluate,
        "generate": benchmarks.generate,
        "judge": benchmarks.judge,
        "compare": comparison.compare,
    },
}
"""The commands by what a user is about to do, in the order of `uft --help`."""
for panel, commands in _PANELS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)


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
    """Run the command and end the process with its exit code; no error shows a traceback."""
    prepare_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the reason is in uft_ds/train.py
    # torch asks the driver's management library whether there is a GPU. The driver itself, once asked, would not work
    # in the ranks that are forked from this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    warnings.simplefilter("ignore", FutureWarning)  # between the libraries that we use; a user cannot fix them
    tell_retries_once()
    quiet_bitsandbytes()
    code: int | str | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except (UserError, CheckFailed) as error:
        code = _failed(error.exit_code, str(error))
    except Exception as error:  # noqa: BLE001 - the one place for what no part of a command has explained
        problem = _lost_output()
        code = _failed(*(ending(error) if problem is None else (EXIT_BAD_INPUT, problem)))
    problem = _lost_output()
    if problem is not None:
        code = _failed(EXIT_BAD_INPUT, problem)
    sys.exit(code)


def _failed(code: int, message: str) -> int:
    print(f"error: {visible(as_typed(message))}", file=sys.stderr)
    return code


def _lost_output() -> str | None:
    """Says that standard output cannot be written, as on a full disk; None if nothing is left to write."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes again when it ends, and would print an error of its own.
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        return f"standard output: cannot be written ({error.strerror or error})"
    return None
