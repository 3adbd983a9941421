"""Any row in any format: refused as a ValueError, or its mask is the one that Hugging Face's own API gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from any_rows import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import examples
from slow_masks import CannotBeLearned, Supervised, supervised
from suites import long_but
from test_tokenize import (
    FORGETS_THOUGHTS,
    INST,
    MOVES_SYSTEM,
    OPENS_THOUGHT,
    TRIMS,
    build_merging,
    build_sentencepiece_like,
)
from tiny import CHATML, build_tiny_tokenizer

from uft_ds.data.example import Example, Pair, Sequence
from uft_ds.data.formats.fields import LeftOut
from uft_ds.data.formats.table import FORMATS, format_named
from uft_ds.data.store.building import RowRules, examine_row
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import CONTROL, EQUAL, LONG, TRIMMED, load_tokenizer

TEMPLATES = {
    "chatml": CHATML,
    "merging": CHATML,
    "forgets thoughts": FORGETS_THOUGHTS,
    "moves system": MOVES_SYSTEM,
    "opens thought": OPENS_THOUGHT,
    "trims": TRIMS,
    "inst": INST,
}
BUILDERS = {"inst": build_sentencepiece_like, "merging": build_merging}
REFUSALS = (
    "generation prompt is not a prefix", "ends this turn by another token", "refuses a conversation of roles",
    "does not write the", "the rendered turn does not end in the end-of-turn token", "leave out this turn",
)  # fmt: skip
"""Parts of the reasons, besides a format's own, for which a row is refused: docs/data.md lists them."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("templates")
    found = {}
    for name, template in TEMPLATES.items():
        build = BUILDERS.get(name, build_tiny_tokenizer)
        (folder / "template.jinja").write_text(template)
        found[name] = load_tokenizer(str(build(folder / name)), chat_template=str(folder / "template.jinja"))
    return found


def test_every_format_has_rows() -> None:
    """A new format must be tried here, too."""
    assert set(ROWS) == set(FORMATS) - {"recorded"}  # whose tokens are given: no template makes a mask of them


RULES = st.builds(
    RowRules,
    format=st.just(""),
    score=st.none() | st.floats(0, 1),
    max_length=st.integers(1, 400) | st.just(10_000),
    merge=st.booleans(),
    trim_prompt=st.booleans(),
    split_pairs=st.booleans(),
)


@pytest.mark.parametrize("name", list(ROWS))
@settings(max_examples=examples(30, 9100), deadline=None)
@given(data=st.data(), template=st.sampled_from(list(TEMPLATES)), rules=RULES)
def test_any_row(
    chats: dict[str, ChatTokenizer], name: str, data: st.DataObject, template: str, rules: RowRules
) -> None:
    """Nothing but a ValueError with a reason, no response lost or doubled, and each mask that of the slow way."""
    given_row = data.draw(ROWS[name])
    chat, rules = chats[template], replace(rules, format=name)
    try:
        kind, units, dropped, changed = examine_row(given_row, rules, format_named(name), chat, file=0, line=1)
    except ValueError as error:
        refusal = error
    else:
        check_outcome(given_row, rules, kind, [unit for unit, _ in units], dropped, changed)
        check_masks([unit for unit, _ in units], items_of(given_row, rules) or [], dropped, rules, chat)
        return
    try:
        items = items_of(given_row, rules)
    except ValueError:
        assert str(refusal)
        return
    # A format has read the row, so the tokenizer, or a look at several of its items, has refused it.
    of_items = ("items of several kinds", "column", "turn", "expected", "score")
    assert items is not None
    assert any(part in str(refusal) for part in (*REFUSALS, *of_items))


def check_outcome(
    given_row: Mapping[str, Any],
    rules: RowRules,
    kind: str | None,
    units: list[tuple[Sequence, ...]],
    dropped: Mapping[str, int],
    changed: Mapping[str, int],
) -> None:
    """Every response is in a unit or counted as dropped; units are as long as they may be."""
    items = items_of(given_row, rules)
    if items is None:
        assert (kind, units, sum(dropped.values()) in (0, 2)) == (None, [], True)
        return
    responses = [response for unit in units for sequence in unit for response in sequence.responses]
    assert len(responses) + sum(dropped.values()) == sum(item.num_responses for item in items)
    assert set(dropped) <= {LONG, CONTROL, EQUAL, "tie"}
    assert set(changed) <= ({TRIMMED} if rules.trim_prompt else set())
    if isinstance(items[0], Pair):
        assert kind == ("pair with scores" if items[0].scored else "pair")
    else:
        assert kind == items[0].kind
    for unit in units:
        is_pair = isinstance(items[0], Pair) and not rules.split_pairs
        assert len(unit) == (2 if is_pair else 1)
        for sequence in unit:
            assert sequence.num_tokens <= rules.max_length
            assert sequence.num_tokens == sequence.responses[-1].end


def items_of(given_row: Mapping[str, Any], rules: RowRules) -> list[Example | Pair] | None:
    try:
        return list(format_named(rules.format)(given_row, score=rules.score))
    except LeftOut:
        return None


def check_masks(
    units: list[tuple[Sequence, ...]],
    items: list[Example | Pair],
    dropped: Mapping[str, int],
    rules: RowRules,
    chat: ChatTokenizer,
) -> None:
    """Each span is one of the slow way's, with the same prompt before it, and none of these is used twice.

    What the slow way finds besides is too long, or counted for another reason.
    """
    other_reasons = sum(count for reason, count in dropped.items() if reason != LONG)
    expected: list[Supervised] = []
    for item in items:
        try:
            found = supervised(item, chat.tokenizer, chat.end_of_turn)
        except CannotBeLearned:
            assert other_reasons, "a row that cannot be learned from was taken"
            continue
        if isinstance(item, Pair) and not rules.split_pairs:  # the longer side decides on both
            longest = max(one.longest for one in found)
            found = [replace(one, longest=longest) for one in found]
        expected += found
    for unit in units:
        for sequence in unit:
            ids, last_end = sequence.token_ids_T.tolist(), 0
            for response in sequence.responses:
                assert 0 <= last_end < response.start < response.end <= sequence.num_tokens
                last_end = response.end
                text = spoken(chat, ids[response.start : response.end])
                prompt = tuple(ids[: response.start])
                alike = [one for one in expected if (written(one.text, chat), one.score) == (text, response.score)]
                exact = [one for one in alike if one.prompt_ids == prompt and one.num_tokens == response.num_tokens]
                trimmed = [one for one in alike if is_long(one, rules)] if rules.trim_prompt else []
                assert exact or trimmed, f"{text!r} is supervised after {chat.tokenizer.decode(list(prompt))!r}"
                expected.remove((exact or trimmed)[0])
    if not other_reasons:
        assert all(is_long(one, rules) for one in expected)
        assert len(expected) <= dropped.get(LONG, 0)


def is_long(one: Supervised, rules: RowRules) -> bool:
    return one.longest > rules.max_length


def spoken(chat: ChatTokenizer, ids: list[int]) -> str:
    """Supervised tokens as text. SentencePiece's decoder adds a space."""
    return chat.tokenizer.decode(ids).lstrip(" ")


def written(text: str, chat: ChatTokenizer) -> str:
    """What the tokenizer can say of a text: the one like SentencePiece knows ASCII alone, and ▁ as a space."""
    if not chat.tokenizer.chat_template.startswith("{{ '<s>' }}"):
        return text.lstrip(" ")
    known = "".join(c for c in text.replace("▁", " ") if c in "\n\t" or " " <= c <= "~")
    return known.lstrip(" ")


@pytest.mark.parametrize("name", long_but(["jsonl", "sharegpt", "kto"], ROWS))
def test_rows_are_mostly_examined(chats: dict[str, ChatTokenizer], name: str) -> None:
    """The rows above reach the tokenizer in every format: a strategy of bad rows alone would prove nothing."""
    rules = RowRules(name, None, 400, merge=True, trim_prompt=True)
    num_good = 0  # of 50

    @settings(max_examples=50, deadline=None, database=None, derandomize=True)
    @given(ROWS[name])
    def count(given_row: dict[str, Any]) -> None:
        nonlocal num_good
        try:
            _, units, _, _ = examine_row(given_row, rules, format_named(name), chats["chatml"], file=0, line=1)
        except ValueError:
            return
        num_good += bool(units)

    count()
    assert num_good >= 3
