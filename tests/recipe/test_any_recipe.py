"""Any recipe: settings that read back equal from what a run stores, or a UserError that names the recipe."""

from __future__ import annotations

import math
import string
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Len
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from recipes import MINIMAL
from searching import examples

from uft_ds.data.example import KINDS
from uft_ds.data.formats.table import FORMATS
from uft_ds.errors import EXIT_BAD_INPUT, UserError
from uft_ds.host.faults import foreseen
from uft_ds.objectives.losses import LOSSES, PRESETS
from uft_ds.recipe.described import describe_keys, section_of
from uft_ds.recipe.file import dump_value, load_recipe, load_yaml, stored_recipe
from uft_ds.recipe.schema import Recipe
from uft_ds.recipe.section import Section
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.run.settings import located

HELD_OUT = "  held_out:\n    - {format: jsonl, path: c.jsonl}\n"
ONLINE = "    - {format: prompts, path: p.jsonl, answers: 4, score_by: 'regex:4'}\n"
JUDGE = "{by: judge, judge: {url: 'http://127.0.0.1/v1', model: m}}"
TASKS = f"evaluate:\n  tasks:\n    - {{name: sums, path: t.jsonl, score_by: {JUDGE}}}\n"
WHOLE = MINIMAL.replace("sources:\n", f"sources:\n{ONLINE}").replace("output:", f"{HELD_OUT}{TASKS}output:")
WORDS = (
    *LOSSES, *PRESETS, *KINDS, *FORMATS, "zero3", "zero2", "held_out/loss", "held_out/loss/pair", "q_proj", "a.jsonl",
    "some/model", "~", "~/x", "~nobody_at_all/x", "runs/small", "", " ", ".", "..", "null", "true", "010", "1:30",
    "1e-5", "0x1F", ".inf", "2024-02-30", "\0", "\n", "é日🙂", "\x85", "\ud800", "a: b", "[", "{", "#", "&a", "*a",
    "!!int x",
)  # fmt: skip
TEXTS = st.sampled_from(WORDS) | st.text(max_size=12)
NUMBERS = (
    st.integers(-3, 70)
    | st.integers()
    | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**40, -(10**40)])
    | st.floats()
    | st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-300, 3.4e38, 3.5e38, math.inf, math.nan, 5e-324])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | NUMBERS, inner, max_size=3),
    max_leaves=4,
)
LONG = st.sampled_from(["0xf", "0o7", "9", "-9", "1.", "x", "[1", "a: "]).map(lambda start: start + start[-1] * 5000)
RAW = st.text(string.printable, max_size=20) | LONG | st.sampled_from(
    ["1e9999", "0o777", "!!binary =", "!!set {a}", "!!timestamp x", "{a: 1, a: 2}",
     "[" * 40 + "]" * 40, "? [a]", "<<: {a: 1}", "- 1\n- 2", "a\n---\nb", "%YAML 1.1", "\t1", "'", '"\\x0"', "|\n x"]
)  # fmt: skip


def one_of_three(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(good, good, bad)


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a field's type and within its bounds; texts are any."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(members[0], (*metadata, *members[1:]))
    if origin in (Union, UnionType):
        return st.one_of([values_of(member, metadata) for member in members])
    if origin is Literal:
        return st.sampled_from(members)
    if origin is list:
        sizes = [part for part in _constraints(metadata) if isinstance(part, Len)]
        least = max((part.min_length for part in sizes), default=0)
        most = min((part.max_length for part in sizes if part.max_length is not None), default=max(3, least))
        return st.lists(values_of(members[0]), min_size=least, max_size=most)
    if origin is dict:
        keys = st.sampled_from(KINDS) | st.sampled_from([*LOSSES, "prompt", "response"])
        return st.dictionaries(keys, values_of(members[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields
        required = {name: values_of_field(field) for name, field in fields.items() if field.is_required()}
        optional = {name: values_of_field(field) for name, field in fields.items() if not field.is_required()}
        return st.fixed_dictionaries(required, optional=optional)
    if annotation in (int, float):
        return _numbers(annotation, _constraints(metadata))
    patterns = [part.pattern for part in _constraints(metadata) if getattr(part, "pattern", None)]
    if annotation is str and patterns:
        return st.from_regex(patterns[0], fullmatch=True)
    return {NoneType: st.none(), bool: st.booleans(), str: TEXTS}[annotation]


def values_of_field(field: FieldInfo) -> st.SearchStrategy[Any]:
    return values_of(field.annotation, tuple(field.metadata))


def _constraints(metadata: tuple[Any, ...]) -> list[Any]:
    """Bounds, also those inside of pydantic's `Field(...)`."""
    return [inner for part in metadata for inner in (part.metadata if isinstance(part, FieldInfo) else [part])]


def _numbers(kind: type, bounds: list[Any]) -> st.SearchStrategy[Any]:
    least = max([getattr(part, name) for part in bounds for name in ("ge", "gt") if hasattr(part, name)], default=None)
    most = min([getattr(part, name) for part in bounds for name in ("le", "lt") if hasattr(part, name)], default=None)
    if kind is int:
        usual = st.integers(max(1, least or 0), 40) if most is None or most > 40 else st.nothing()
        return usual | st.integers(least, most)
    return st.floats(least, most, allow_nan=not bounds) | st.sampled_from([1e-5, 0.1, 0.5, 1.0])


def fields_of(section: type[Section] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Each leaf's field by its key, as `describe_keys` names them, and each section's and list's own."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field
        inner = section_of(field.annotation)
        if inner is not None:
            is_list = get_origin(field.annotation) is list
            found |= fields_of(inner, f"{prefix}{name}.{'0.' if is_list else ''}")
    return found


FIELDS = fields_of()
KEYS = {key: values_of_field(field) for key, field in FIELDS.items()}


def overrides() -> st.SearchStrategy[str]:
    def of_key(key: str) -> st.SearchStrategy[str]:
        value = one_of_three(KEYS[key], JUNK).map(_written)
        return one_of_three(value, RAW).map(lambda text: f"{key}={text}")

    known = st.sampled_from(sorted(KEYS)).flatmap(of_key)
    unknown = st.builds("{}.{}={}".format, st.sampled_from(sorted(KEYS)), TEXTS, RAW) | TEXTS
    return st.one_of(known, known, known, known, known, unknown)


def _written(value: Any) -> str:
    return dump_value(value)


def test_every_key_has_values() -> None:
    """A new key is tried, too: the keys come from the schema."""
    assert {key for key, *_ in describe_keys()} <= set(KEYS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any") / "whole.yaml"
    path.write_text(WHOLE, encoding="utf-8")
    return path


def loaded(recipe: Path, given_overrides: list[str]) -> Settings | None:
    """The settings, or None for a UserError, which names the recipe."""
    try:
        return load_settings(str(recipe), tuple(given_overrides))
    except UserError as error:
        refusal = error
    assert refusal.exit_code == EXIT_BAD_INPUT
    assert str(refusal).startswith(f"recipe {recipe}")
    return None


def on_this_disk(found: Settings) -> Settings | None:
    """The settings with absolute paths; None where a path is refused with exit code 2, as one that is too long is."""
    try:
        return located(found)
    except UserError as error:
        refusal: Exception = error
    except OSError as error:
        refusal = error
    assert isinstance(refusal, UserError) or foreseen(refusal) is not None
    return None


def assert_read_back(found: Settings, folder: Path) -> None:
    """What a run stores gives the settings again, also once paths are absolute; the second time nothing changes."""
    stored = folder / "stored.yaml"
    stored.write_text(stored_recipe(found.stored), encoding="utf-8")
    assert same(load_settings(str(stored)), found)
    absolute = on_this_disk(found)
    if absolute is None:
        return
    stored.write_text(stored_recipe(absolute.stored), encoding="utf-8")
    again = load_settings(str(stored))
    assert again.stored == absolute.stored
    assert same(located(again), absolute)


def same(one: Settings, other: Settings) -> bool:
    """Equal but for which keys the recipe named: the stored one names all."""
    return (one.stored, one.objective, one.data, one.train, one.model) == (
        other.stored, other.objective, other.data, other.train, other.model
    )  # fmt: skip


@settings(max_examples=examples(120, 10_000), suppress_health_check=[HealthCheck.too_slow])
@given(given_overrides=st.lists(overrides(), min_size=1, max_size=5))
def test_any_overrides(whole: Path, given_overrides: list[str]) -> None:
    """Of every key, with values of its type and others, and with any text."""
    found = loaded(whole, given_overrides)
    if found is not None:
        assert_read_back(found, whole.parent)


@settings(max_examples=examples(60, 5_000))
@given(data=st.data())
def test_any_text(whole: Path, data: st.DataObject) -> None:
    """A recipe in which a piece was cut out, doubled or replaced."""
    start = data.draw(st.integers(0, len(WHOLE)))
    end = data.draw(st.integers(start, min(len(WHOLE), start + 12)))
    piece = data.draw(RAW | TEXTS | st.just(WHOLE[start:end] * 2))
    recipe = whole.parent / "cut.yaml"
    recipe.write_bytes(f"{WHOLE[:start]}{piece}{WHOLE[end:]}".encode("utf-8", "surrogatepass"))
    found = loaded(recipe, [])
    if found is not None:
        assert_read_back(found, whole.parent)


def test_overrides_are_mostly_accepted(whole: Path) -> None:
    """The values above give settings often enough: refusals alone would prove little."""
    num_accepted = 0  # of 200: keys of scorers go with one source alone

    @settings(max_examples=200, database=None, derandomize=True)
    @given(overrides())
    def count(override: str) -> None:
        nonlocal num_accepted
        num_accepted += loaded(whole, [override]) is not None

    count()
    assert num_accepted >= 30
    assert load_yaml("{a: 1}") == {"a": 1}
    assert load_recipe(str(whole)).data.held_out
