"""Arguments and the console that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from uft_ds.host.process import ended_as_by_ctrl_c
from uft_ds.host.standard_streams import drop_useless_size, is_terminal
from uft_ds.host.terminal import SafeConsole

if TYPE_CHECKING:
    from uft_ds.recipe.settings import Settings

drop_useless_size()  # before the console reads it
_UNLIMITED = 10_000  # columns: in files and pipes no line is wrapped
console = SafeConsole(  # no markup: paths may contain brackets
    markup=False, highlight=False, width=None if is_terminal() or "COLUMNS" in os.environ else _UNLIMITED
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a YAML file.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.lr=1e-5."),
]


def settings_given(recipe: str, overrides: list[str] | None) -> Settings:
    """The settings of a recipe as it is given on the command line. Call it before anything imports torch.

    Reading the recipe needs none of the imports that take seconds, so a slip in it is told at once.

    Raises:
        UserError: names the recipe and the key.
    """
    from uft_ds.recipe.file import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()))
    from uft_ds.recipe.to_settings import settings_of

    return settings_of(loaded)


def quiet_loading() -> None:
    """Disable transformers' progress bar unless the output is a terminal."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


@contextmanager
def _ended_in_words(state: str) -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end the command as Ctrl-C does; how it was ended is printed.

    Args:
        state: what has become of the work, as the end of a sentence.
    """
    try:
        with ended_as_by_ctrl_c():
            yield
    except KeyboardInterrupt as end:
        with suppress(OSError):  # the terminal may be what has gone
            print(f"stopped by {str(end) or 'Ctrl-C'}: {state}", file=sys.stderr)
        raise


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Within the block a signal ends the command, and it is said that nothing incomplete is left."""
    with _ended_in_words("what was not complete is deleted"):
        yield


@contextmanager
def stopped_in_words(state: str) -> Iterator[None]:
    """Within the block a signal ends the command, and it is said what has become of the work, and that it goes on."""
    with _ended_in_words(f"{state}; the same command goes on"):
        yield
