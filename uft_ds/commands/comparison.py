"""`uft compare` puts evaluated models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from uft_ds.commands.shared import console


def compare(
    evaluations: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...",
            help="Folders of evaluations, or runs that have some; those of one name belong to one model.",
        ),
    ],
    against: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it
        typer.Option(metavar="NAME", help="The model that the others are compared with; the first if not given."),
    ] = None,
    origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="A model that the others were trained from (the base, the SFT model), for the alignment tax.",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Write comparison.md, .tex, .json and .png there."),
    ] = None,
    allow_unlike: Annotated[
        bool,
        typer.Option("--allow-unlike", help="Show models that were evaluated in other ways; the tables say how."),
    ] = False,
) -> None:
    """Compare evaluated models: one table like the paper's, differences in pairs, and what alignment has cost.

    Differences are taken over the same items, with bootstrap intervals and a test. Models that were evaluated under
    other conditions (task version, shots, template, judge) are refused, and the conditions named.
    """
    from uft_ds.evaluation.comparison.compare import compare as compared
    from uft_ds.evaluation.comparison.contestants import contestants_of
    from uft_ds.evaluation.comparison.files import check_free, write_comparison
    from uft_ds.evaluation.comparison.tables import difference_table, main_table, notes, tax_table

    if out is not None:
        check_free(out)
    found = compared(contestants_of(evaluations), against=against, origins=origin or (), allow_unlike=allow_unlike)
    titles = ("", f"differences from {found.against}", "alignment tax, in points")
    for title, rows in zip(titles, (main_table(found), difference_table(found), tax_table(found)), strict=True):
        if rows:
            console.print(_shown(title, rows))
    for note in notes(found):
        console.print(note)
    if out is not None:
        for path in write_comparison(found, out):
            console.print(f"written: {path}")


def _shown(title: str, rows: list[list[str]]) -> object:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for place, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
