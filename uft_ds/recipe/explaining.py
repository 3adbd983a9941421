"""Explain what pydantic finds wrong in a recipe, by the recipe's own keys: what was given, and what is expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from uft_ds.recipe.described import all_keys, section_of
from uft_ds.recipe.names import NULL_MEANS, unknown_key
from uft_ds.recipe.section import Section

SHOWN_LETTERS = 200
"""Longest value that a message shows whole; a few lines of YAML can hold a million leaves."""
_KEYS_SHOWN = 6
_NOTHING = ("none", "null", "nil", "no", "off", "false")
"""Words for what YAML calls null; as values of an override they are texts, or false."""


def shown(value: Any) -> str:
    """A value as messages quote it, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."


def explained(error: ValidationError, root: type[Section]) -> Iterator[str]:
    """The errors of a tree of type `root`, one line per key."""
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_place(problem["loc"], root), []).append(problem)
    for place, problems in found.items():
        # Each member of a union reports its own error; the deepest place belongs to the member that was meant.
        if not any(other != place and other[: len(place)] == place for other in found):
            yield from _lines(place, problems, root)


def _place(location: tuple[str | int, ...], root: type[Section]) -> tuple[str | int, ...]:
    """The location without the names of union members, which pydantic inserts: only keys and indices remain."""
    place: list[str | int] = []
    annotation: Any = root
    for part in location:
        annotation = _bare(annotation)
        origin, members = get_origin(annotation), get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            place.append(part)
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif origin in (dict, list):
            place.append(part)
            annotation = members[-1]
        elif origin in (Union, UnionType):  # the part names a member
            kind = next((kind for kind in (dict, list) if str(part).startswith(kind.__name__)), None)
            annotation = next((member for member in members if get_origin(_bare(member)) is kind), None)
    return tuple(place)


def _bare(annotation: Any) -> Any:
    """The annotation without metadata and without the None of an optional value."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _lines(place: tuple[str | int, ...], problems: list[Any], root: type[Section]) -> Iterator[str]:
    key, first = ".".join(map(str, place)), problems[0]
    if first["type"] == "extra_forbidden":
        yield f"{key}: {unknown_key(str(place[-1]), _known_keys(place[:-1], root), all_keys(root))}"
    elif first["type"] == "missing":
        yield f"{key}: required, but not given"
    elif first["type"] == "value_error":
        yield from str(first["ctx"]["error"]).splitlines()
    else:
        expected = dict.fromkeys(_expected(problem, place, root) for problem in problems)
        first_expected, *others = expected
        either = [first_expected, *(other.removeprefix("input should be ") for other in others)]
        meant = _what_is_meant(first["input"], place, problems, root)
        yield f"{key}: {shown(first['input'])} given; {', or '.join(either)}{meant}"


def _what_is_meant(given: Any, place: tuple[str | int, ...], problems: list[Any], root: type[Section]) -> str:
    """What a value of the wrong type was most probably meant to be; empty if that is not known."""
    annotation = _annotation_at(place, root)
    if NoneType in get_args(annotation):
        key = ".".join(map(str, place))
        null = f", or null ({NULL_MEANS[key]})" if key in NULL_MEANS else ""
        is_nothing = given is False or (isinstance(given, str) and given.lower() in _NOTHING)
        return f"{null}; did you mean {key}=null?" if is_nothing else null
    return f": [{given}]" if _is_lone_text(given, annotation, problems) else ""


def _is_lone_text(given: Any, annotation: Any, problems: list[Any]) -> bool:
    """Whether a text is given where a list of texts is expected."""
    if not isinstance(given, str) or not any(problem["type"] == "list_type" for problem in problems):
        return False
    members = [_bare(member) for member in (annotation, *get_args(annotation))]
    lists = [get_args(member)[0] for member in members if get_origin(member) is list]
    return any(of is str or get_origin(of) is Literal for of in lists)


def _expected(problem: Any, place: tuple[str | int, ...], root: type[Section]) -> str:
    """What pydantic expected; it writes out all digits of a bound such as 3.4e38, and speaks of its own validation.

    Of a section it would name the class.
    """
    if problem["type"] == "model_type":
        known = _known_keys(place, root)
        more = ", ..." if len(known) > _KEYS_SHOWN else ""
        return f"input should be keys and values ({', '.join(known[:_KEYS_SHOWN])}{more})"
    text: str = (problem["msg"][0].lower() + problem["msg"][1:]).replace(" after validation", "")
    return re.sub(r"\d{30,}", lambda digits: f"{float(digits[0]):g}", text)


def _known_keys(place: tuple[str | int, ...], root: type[Section]) -> list[str]:
    return list(_section_at(place, root).model_fields)


def _section_at(place: tuple[str | int, ...], root: type[Section]) -> type[Section]:
    section: Any = root
    for part in place:
        if isinstance(part, str):
            section = section_of(section.model_fields[part].annotation)
    return section


def _annotation_at(place: tuple[str | int, ...], root: type[Section]) -> Any:
    """The type of a section's key; None for a place inside of a list or a map."""
    section: Any = root
    for part in place[:-1]:
        field = None if section is None or isinstance(part, int) else section.model_fields.get(part)
        section = section if isinstance(part, int) else section_of(field.annotation) if field else None
    field = section.model_fields.get(place[-1]) if section is not None else None
    return field.annotation if field else None
