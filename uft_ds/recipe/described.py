"""The keys of a recipe as rows for people: defaults, allowed words and meanings, from the typed tree itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml

from uft_ds.data.formats.table import format_names
from uft_ds.recipe.schema import Recipe, SourceSection
from uft_ds.recipe.section import Section


def section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type: the type itself, or a member of its union or list; None if there is none."""
    nested = [a for arg in get_args(annotation) for a in get_args(arg)]
    candidates = (annotation, *get_args(annotation), *nested)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


class Described(NamedTuple):
    """A key of the recipe.

    default: in one line of YAML. allowed: the words that may be given; empty if any may, or none.
    """

    key: str
    default: str
    allowed: tuple[str, ...]
    meaning: str


def describe_keys(section: type[Section] = Recipe, prefix: str = "") -> list[Described]:
    """Every leaf, in the order of a recipe; the keys of sources have the index 0."""
    rows: list[Described] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            is_list = get_origin(field.annotation) is list
            rows += describe_keys(inner, f"{prefix}{name}.{'0.' if is_list else ''}")
        else:
            default = "(required)" if field.is_required() else _in_one_line(field.default)
            allowed = (
                format_names() if (section, name) == (SourceSection, "format") else tuple(_words(field.annotation))
            )
            meaning = " ".join((field.description or "").split())
            rows.append(Described(prefix + name, default, allowed, meaning))
    return rows


def all_keys(root: type[Section]) -> list[str]:
    """The keys of all sections of a recipe, held-out sources aside, whose keys are those of sources.

    Args:
        root: the type of the whole tree; one that is no recipe's has none.
    """
    described = describe_keys() if root is Recipe else []
    return [row.key for row in described if not row.key.startswith("data.held_out.")]


def _in_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).split("\n...")[0].strip()


def _words(annotation: Any) -> Iterator[str]:
    """The texts that a type allows by name; those of lists are their members'. Keys of maps are not among them."""
    if get_origin(annotation) is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    elif get_origin(annotation) is not dict:
        members = get_args(annotation)
        if bool in members and any(get_origin(member) is Literal for member in members):
            yield from ("true", "false")
        for member in members:
            yield from _words(member)
