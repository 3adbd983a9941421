"""`uft recipe`: show and list recipes and their keys."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from uft_ds.commands.shared import Overrides, RecipeName, console, settings_given
from uft_ds.errors import UserError

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command("show")
def recipe_show(
    recipe: RecipeName,
    overrides: Overrides = None,
    key: Annotated[Optional[str], typer.Option(help="Only this key's value, such as output.")] = None,  # noqa: UP045
) -> None:
    """Print a recipe with all defaults and overrides filled in."""
    from uft_ds.recipe.file import dump_recipe, leaves_of, load_recipe
    from uft_ds.recipe.names import unknown_key

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if key is None:
        print(dump_recipe(loaded), end="")
        return
    leaves = leaves_of(loaded)
    if key not in leaves:
        raise UserError(f"--key {key}: {unknown_key(key, loaded.model_fields_set, leaves)}")
    print(leaves[key])


@app.command("server")
def recipe_server(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print what `vllm serve` needs for an online recipe, an argument a line."""
    settings = settings_given(recipe, overrides)
    from uft_ds.run.generators import arguments_of_server

    print("\n".join(arguments_of_server(settings)))


@app.command("list")
def recipe_list() -> None:
    """The recipes that come with the package, and what each is."""
    from rich.table import Table

    from uft_ds.recipe.file import described_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for name, description in described_recipes().items():
        table.add_row(name, description)
    console.print(table)


@app.command("keys")
def recipe_keys(
    section: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it
        typer.Argument(metavar="[SECTION]", help="Only the keys of this section, such as train, or this one key."),
    ] = None,
) -> None:
    """Every key of a recipe, its default, the words that it allows and its meaning."""
    from uft_ds.recipe.described import describe_keys
    from uft_ds.recipe.names import unknown_key
    from uft_ds.recipe.schema import Recipe

    every = describe_keys()
    shown = [row for row in every if section is None or f"{row.key}.".startswith(f"{section}.")]
    if not shown:
        raise UserError(f"{section}: {unknown_key(str(section), Recipe.model_fields, [row.key for row in every])}")
    for row in shown:
        console.print(f"{row.key} = {row.default}", style="bold")
        if row.allowed:
            console.print(f"    allowed: {', '.join(row.allowed)}")
        console.print(f"    {row.meaning}")
