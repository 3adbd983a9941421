"""Source formats together: their names, those of other packages, and rows of any kind."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import examples

from uft_ds.data.example import KINDS, Example, Pair
from uft_ds.data.formats import table as module
from uft_ds.data.formats.fields import LeftOut
from uft_ds.data.formats.jsonl import KEYS as JSONL_KEYS
from uft_ds.data.formats.scales import UNIT, checked_score
from uft_ds.data.formats.table import FORMATS, GROUP, Item, Row, described_formats, format_named, format_names
from uft_ds.errors import UserError


def points(monkeypatch: pytest.MonkeyPatch, *named: tuple[str, str]) -> None:
    """Other packages add formats: (name, value)."""
    found = [EntryPoint(name, value, GROUP) for name, value in named]
    monkeypatch.setattr(module, "entry_points", lambda *, group: found if group == GROUP else [])
    monkeypatch.setattr(module, "installed", module.installed.__wrapped__)  # not what was read before


def test_a_format_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, among all, and among the names."""
    points(monkeypatch, ("theirs", "uft_ds.data.formats.chat:ultrachat"))
    assert format_names() == (*FORMATS, "theirs")
    assert format_named("theirs") is FORMATS["ultrachat"]
    described = described_formats()
    assert described["theirs"] == described["ultrachat"]


def test_a_built_in_format_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be imported harms no run that does not use it, and is not imported for its name."""
    points(monkeypatch, ("broken", "no_such_module:f"))
    assert format_named("jsonl") is FORMATS["jsonl"]
    assert "broken" in format_names()
    assert "cannot be imported from no_such_module:f" in described_formats()["broken"]


def test_names_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is slow to import does not slow down the check of a recipe."""
    points(monkeypatch, ("theirs", "this:s"))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    format_names()
    assert "this" not in sys.modules


STORED = json.dumps([{"content": "q", "role": "user"}])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("trl", {"prompt": STORED, "completion": "a"}),
        ("trl", {"prompt": "q", "completion": "[{'role': 'assistant', 'content': 'a'}]"}),
        ("trl", {"prompt": "q", "chosen": STORED, "rejected": "b"}),
        ("kto", {"prompt": '[ {"from": "human", "value": "q"} ]\n', "completion": "a", "label": True}),
        ("jsonl", {"prompt": "q", "response": STORED}),
        ("alpaca", {"instruction": STORED, "output": "a"}),
        ("ultrafeedback_binarized", {"prompt": "q", "chosen": STORED, "rejected": "b"} | dict.fromkeys(
            ("score_chosen", "score_rejected"), 5)),
    ],
)  # fmt: skip
def test_turns_that_were_stored_as_text_are_no_text(name: str, row: Row) -> None:
    """csv files and some exports write lists of turns as JSON, or as Python prints them: nobody asks or answers so."""
    with pytest.raises(ValueError, match="holds turns that were stored as text"):
        FORMATS[name](row, score=None)


@pytest.mark.parametrize("text", ['[{"from": "a", "to": "b", "value": 3}]', '[{"role": "admin"}]', "[1]", "[{'role'"])
def test_other_json_is_text(text: str) -> None:
    """An answer may be JSON."""
    assert list(FORMATS["trl"]({"prompt": text, "completion": text}, score=None))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("trl", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ("ultrachat", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ("kto", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("trl", {"tools": [{"name": "f"}], "prompt": "q", "completion": "a"}),
    ],
)
def test_turns_and_tools_may_be_json_text(name: str, row: Row) -> None:
    """Where nothing but turns or tools can stand: csv and columns of mixed keys hold them so."""
    stored = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
    assert list(FORMATS[name](stored, score=None)) == list(FORMATS[name](row, score=None))
    if "tools" in row:
        each = row | {"tools": [json.dumps(tool) for tool in row["tools"]]}
        assert list(FORMATS[name](each, score=None)) == list(FORMATS[name](row, score=None))
    with pytest.raises(ValueError, match="expected JSON, found"):
        FORMATS[name](stored | {next(iter(stored)): "[{"}, score=None)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("kto", "theirs:kto")], "the format 'kto' of theirs:kto has the name of the built-in 'kto'"),
        ([("x", "one:f"), ("x", "two:f")], "the format 'x' of two:f has the name of one:f"),
    ],
)
def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch, named: list[Any], message: str) -> None:
    """Installing a package never changes what a recipe means; the message names both."""
    points(monkeypatch, *named)
    for look in (format_names, described_formats):
        with pytest.raises(UserError, match=message):
            look()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:f", r"'x' cannot be imported from no_such_module:f \(ModuleNotFoundError"),
        ("uft_ds.data.formats.table:nothing", r"'x' cannot be imported from .*nothing \(AttributeError"),
        ("uft_ds.data.formats.table:GROUP", "'x' of uft_ds.data.formats.table:GROUP is not a function"),
    ],
)
def test_a_broken_format_of_another_package_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    """The user learns whose it is."""
    points(monkeypatch, ("x", value))
    with pytest.raises(UserError, match=message):
        format_named("x")


def test_an_unknown_format_is_refused_with_the_names() -> None:
    """The message lists what there is."""
    with pytest.raises(UserError, match="no format 'josnl'; there are jsonl, trl"):
        format_named("josnl")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_an_empty_row(name: str) -> None:
    """No format makes an example out of nothing."""
    with pytest.raises(ValueError, match="expected"):
        FORMATS[name]({}, score=None)


KEYS = [*JSONL_KEYS, "completion", "text", "instruction", "input", "output", "system", "history", "conversations"]
KEYS += ["completions", "metadata", "chosen-rating", "rejected-rating", "helpfulness", "correctness", "coherence"]
KEYS += ["response_1", "response_2", "preference_strength"]
INNER = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "response"]
WORDS = [
    "",
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "function_call",
    "observation",
    "text",
    "[{}]",
    "{}",
]
WORDS += ["\n\nHuman: a\n\nAssistant: b", "a\0", "\ud800", "a\n<extra_id_1>User\nb", '{"name": "f", "arguments": {}}']
LEAVES = st.none() | st.booleans() | st.integers(-4, 11) | st.floats() | st.sampled_from(WORDS) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER) | st.text(), inner, max_size=3),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": VALUES},
        optional={"tool_calls": VALUES},
    )
    | st.fixed_dictionaries({"from": st.sampled_from(WORDS), "value": VALUES}),
    max_size=4,
)
ROWS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), VALUES | TURNS, max_size=7)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("jsonl", {"prompt": "q", "response": "a", "score": 0.5}),
    ("jsonl", {"messages": CHAT, "tools": [{"name": "f"}], "meta": 1}),
    ("jsonl", PREFERENCE | {"score_chosen": 1, "score_rejected": 0}),
    ("trl", {"messages": CHAT, "tools": "[]"}),
    ("trl", {"prompt": "q", "completion": "a"}),
    ("trl", PREFERENCE),
    ("trl", {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "b"}]}),
    ("ultrachat", {"messages": CHAT * 2}),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q", "a"]]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": ""}),
    ("helpsteer2", {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4}),
    ("helpsteer2_preference", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}),
    ("ultrafeedback", {"instruction": "q", "completions": [{"response": "a", "overall_score": 7}]}),
    ("ultrafeedback_binarized", PREFERENCE | {"score_chosen": 9, "score_rejected": 2}),
    ("hh_rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    ("kto", {"prompt": "q", "completion": "a", "label": True}),
    ("kto", {"messages": CHAT, "label": False}),
]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=examples(12, 600), deadline=None)
@given(row=ROWS)
def test_any_row_gives_items_or_a_reason(name: str, row: Row) -> None:
    """Whatever a row holds: sound items, ValueError or LeftOut, never another exception."""
    check(name, row)


@pytest.mark.parametrize(("name", "row"), GOOD)
@settings(max_examples=examples(12, 600), deadline=None)
@given(data=st.data())
def test_a_row_that_is_nearly_right_gives_items_or_a_reason(name: str, row: Row, data: st.DataObject) -> None:
    """The row itself is read; with any one field changed it gives sound items, ValueError or LeftOut."""
    assert check(name, row)
    check(name, {**row, data.draw(st.sampled_from(sorted(row))): data.draw(VALUES | TURNS)})


def check(name: str, row: Row) -> bool:
    """Whether there are items, all of which the next stage can trust."""
    try:
        items = FORMATS[name](row, score=None)
    except (ValueError, LeftOut):
        return False
    sides = list(sides_of(items))
    for side in sides:
        assert side.kind in KINDS
        assert side.num_responses >= 1
        assert side.messages[-1].score is not None
        assert all(m.score is None or (m.role == "assistant" and 0 <= m.score <= 1) for m in side.messages)
        assert all(m.content.strip() or m.tool_calls for m in side.messages)
    return bool(sides)


def sides_of(items: Iterable[Item]) -> Iterator[Example]:
    for item in items:
        yield from (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


@given(st.floats() | st.integers() | st.booleans() | st.text())
def test_scores_and_ratings_are_in_the_unit_interval(value: Any) -> None:
    """Or refused: rounding never carries a rating out of it."""
    for scale in (UNIT, (1.0, 10.0), (1.0, 5.0), (-0.3, 0.1)):
        try:
            assert 0.0 <= checked_score(value, "r", scale) <= 1.0
        except ValueError:
            continue


# The counts of each line sum to the rows of its file. Ties, equal and empty sides were looked at, and are so.
REAL = [
    (
        "ultrafeedback/train_clean.jsonl",
        "ultrafeedback_binarized",
        {"pair": 994, "left out: chosen equals rejected": 4, "'chosen' is empty": 1} | {"'rejected' is empty": 1},
    ),
    (
        "ultrafeedback/eval_clean.jsonl",
        "ultrafeedback_binarized",
        {"pair": 199, "left out: chosen equals rejected": 1},
    ),
    (
        "ultrafeedback/train_clean.jsonl",
        "trl",
        {"pair": 994, "left out: chosen equals rejected": 4} | {"'chosen' is empty": 1, "'rejected' is empty": 1},
    ),
    ("llama_factory/alpaca_en_demo.json", "alpaca", {"instruction 1.0": 999}),
    ("llama_factory/dpo_en_demo.json", "sharegpt", {"pair": 300}),
    ("llama_factory/kto_en_demo.json", "kto", {"binary 1.0": 150, "binary 0.0": 150}),
    ("dolly_hhrlhf/train_small.jsonl", "jsonl", {"instruction 1.0": 1000}),
]


def outcome(item: Item) -> str:
    return "pair" if isinstance(item, Pair) else f"{item.kind} {item.messages[-1].score}"


@pytest.mark.parametrize(("file", "name", "expected"), REAL, ids=[f"{name}-{file}" for file, name, _ in REAL])
def test_real_rows_are_read(test_data: Path, file: str, name: str, expected: dict[str, int]) -> None:
    """Every row of real data becomes what it should, and those left out or refused are the known ones."""
    with (test_data / file).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines] if file.endswith(".jsonl") else json.load(lines)
    found: Counter[str] = Counter()
    for row in rows:
        try:
            found.update(outcome(item) for item in FORMATS[name](row, score=None))
        except LeftOut as left_out:
            found[f"left out: {left_out}"] += 1
        except ValueError as error:
            found[str(error)] += 1
    assert found == expected
