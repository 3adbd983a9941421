"""`uft data`: show data as training uses it, and the source formats."""

from __future__ import annotations

import textwrap
from typing import Annotated, Optional

import typer

from uft_ds.commands.shared import Overrides, RecipeName, console, settings_given
from uft_ds.errors import UserError

app = typer.Typer(help="Look at data.", no_args_is_help=True)


@app.command("preview")
def data_preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Sampled rows of each source.")] = 2,
    source: Annotated[Optional[int], typer.Option(min=0, help="Only this one of data.sources.")] = None,  # noqa: UP045
    held_out: Annotated[bool, typer.Option("--held-out", help="The held-out sources instead.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Whole rows; long ones are cut otherwise.")] = False,
) -> None:
    """Show what a recipe trains on: sampled rows with their masks and scores, and what is left out and why.

    Nothing is launched and no weights are loaded.
    """
    settings = settings_given(recipe, overrides)
    from uft_ds.run.prepare import prepare_fitting_data
    from uft_ds.run.preview import legend, rendered_rows, show_data, steps_line
    from uft_ds.run.start import preparation
    from uft_ds.training.steps import steps_of

    with preparation(console) as on_progress:
        chat, data = prepare_fitting_data(settings, on_progress)
    sources = data.held_out if held_out else data.train
    if not sources:
        raise UserError("--held-out: the recipe has no data.held_out")
    if source is not None and source >= len(sources):
        raise UserError(f"--source {source}: there are {len(sources)}, numbered from 0")
    console.print(legend())
    for shown in sources if source is None else sources[source : source + 1]:
        for text in rendered_rows(shown, chat, count=rows, seed=seed, full=full):
            console.print(text)
    show_data(settings, data, console)
    console.print(steps_line(steps_of(settings, data), settings.train.examples_per_step))


@app.command("formats")
def data_formats() -> None:
    """Names of the source formats, those of installed plug-ins included."""
    from uft_ds.data.formats.table import described_formats

    for name, description in described_formats().items():
        console.print(name, style="bold")
        console.print(textwrap.indent(description, "    "))


@app.command("schema")
def data_schema() -> None:
    """Print the JSON Schema of one row of our own format, jsonl."""
    import json

    from uft_ds.data.formats.table import jsonl_schema

    print(json.dumps(jsonl_schema(), indent=2))
