"""The table of source formats; a format turns one row of a data set into examples or pairs.

A format is a function `(row, *, score) -> items`; `score` is the source's constant for rows without a score. It raises
ValueError with what was found and what was expected, or `LeftOut` for a good row with nothing to train on; the caller
adds the file and line. FORMATS maps names to formats. Other packages add formats by entry points of the group GROUP.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from uft_ds.data.formats.chat import alpaca, sharegpt, ultrachat
from uft_ds.data.formats.columns import columns_of
from uft_ds.data.formats.feedback import (
    helpsteer2,
    helpsteer2_preference,
    hh_rlhf,
    kto,
    ultrafeedback,
    ultrafeedback_binarized,
)
from uft_ds.data.formats.fields import LeftOut, Row
from uft_ds.data.formats.jsonl import jsonl, jsonl_schema
from uft_ds.data.formats.prompts import prompts
from uft_ds.data.formats.recorded import recorded
from uft_ds.data.formats.trl import trl
from uft_ds.data.formats.turns import Item
from uft_ds.errors import UserError

__all__ = [
    "FORMATS",
    "GROUP",
    "PROMPTS",
    "Format",
    "Item",
    "LeftOut",
    "Row",
    "described_formats",
    "format_named",
    "format_names",
    "jsonl_schema",
]

Format = Callable[..., Iterable[Item]]

FORMATS: dict[str, Format] = {
    "jsonl": jsonl,
    "trl": trl,
    "ultrachat": ultrachat,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "helpsteer2": helpsteer2,
    "helpsteer2_preference": helpsteer2_preference,
    "ultrafeedback": ultrafeedback,
    "ultrafeedback_binarized": ultrafeedback_binarized,
    "hh_rlhf": hh_rlhf,
    "kto": kto,
    "prompts": prompts,
    "recorded": recorded,
}

PROMPTS = "prompts"
"""The format of online sources, whose rows hold no response."""

GROUP = "uft_ds.formats"
"""Group of the entry points by which other packages add formats."""


def described_formats() -> dict[str, str]:
    """The description of each format by name, or the reason why a format of another package cannot be used.

    This imports the formats of other packages.

    Raises:
        UserError: a format of another package has a name that is already in use.
    """
    described = {name: _description(make, "") for name, make in FORMATS.items()}
    for name, point in _plugins().items():
        try:
            described[name] = _description(_load(point), f"(of {point.value}, without a description)")
        except UserError as error:
            described[name] = str(error)
    return described


def _description(make: Format, otherwise: str) -> str:
    columns = columns_of(make)
    read = f"\n\nReads the columns {', '.join(columns)}." if columns else ""
    return inspect.cleandoc(make.__doc__ or otherwise) + read


def format_names() -> tuple[str, ...]:
    """The names of all formats; no format is imported."""
    return (*FORMATS, *_plugins())


def format_named(name: str) -> Format:
    """One format by its name; no other format is imported.

    Raises:
        UserError: no format has this name, or it cannot be imported.
    """
    if name in FORMATS:
        return FORMATS[name]
    plugins = _plugins()
    if name not in plugins:
        raise UserError(f"no format {name!r}; there are {', '.join((*FORMATS, *plugins))}")
    return _load(plugins[name])


@cache
def installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The formats that packages on this `sys.path` declare, read once: it takes longer than all else of a recipe."""
    return tuple(entry_points(group=GROUP))


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in installed(tuple(sys.path)):
        other = f"the built-in {point.name!r}" if point.name in FORMATS else None
        if point.name in found and found[point.name].value != point.value:
            other = found[point.name].value
        if other is not None:
            raise UserError(
                f"the format {point.name!r} of {point.value} has the name of {other}; rename it, or uninstall"
            )
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> Format:
    try:
        loaded = point.load()
    except Exception as error:
        raise UserError(
            f"the format {point.name!r} cannot be imported from {point.value} ({type(error).__name__}: {error})"
        ) from error
    if not inspect.isfunction(loaded):
        raise UserError(f"the format {point.name!r} of {point.value} is not a function")
    return cast(Format, loaded)
