"""`uft recipe`: show and list recipes and their keys."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from uft_ds.commands.shared import Overrides, RecipeName, console
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
    from uft_ds.recipe.names import unknown_name

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if key is None:
        print(dump_recipe(loaded), end="")
        return
    leaves = leaves_of(loaded)
    if key not in leaves:
        raise UserError(f"--key: {unknown_name(key, tuple(leaves))}")
    print(leaves[key])


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
def recipe_keys() -> None:
    """Every key of a recipe, its default and its meaning."""
    from uft_ds.recipe.schema import describe_keys

    for key, default, meaning in describe_keys():
        console.print(f"{key} = {default}", style="bold")
        console.print(f"    {meaning}")
