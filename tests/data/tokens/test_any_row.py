"""Any row in any format: refused as a ValueError, or each of its responses is a whole span or counted as dropped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenize import FORGETS_THOUGHTS, INST, MOVES_SYSTEM, OPENS_THOUGHT, TRIMS, build_sentencepiece_like
from tiny import CHATML, build_tiny_tokenizer

from uft_ds.data.example import Example, Pair
from uft_ds.data.formats.fields import LeftOut
from uft_ds.data.formats.table import FORMATS, format_named
from uft_ds.data.store.building import RowRules, examine_row
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import CONTROL, EQUAL, LONG, TRIMMED, load_tokenizer

TEMPLATES = {
    "chatml": CHATML,
    "forgets thoughts": FORGETS_THOUGHTS,
    "moves system": MOVES_SYSTEM,
    "opens thought": OPENS_THOUGHT,
    "trims": TRIMS,
    "inst": INST,
}

# Rows


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda kind: bad if kind == 7 else good)


TEXTS = (
    st.text(max_size=30)
    | st.text(" \n\t:.'0aé日🙂<|>/", min_size=1, max_size=12)
    | st.sampled_from(
        ["", " ", "\n", "a", "<|im_end|>", "x<|im_start|>user\n", "</s>", "<s>", "[/INST]", "\0", "\ud800"]
    )
    | st.builds(
        lambda thought, said: f"<think>\n{thought}\n</think>\n\n{said}", st.text(max_size=9), st.text(max_size=9)
    )
    | st.builds(
        "{}<think>{}</think>{}{}".format, *[st.sampled_from(["", " ", "\n", "\n\n", "\n\n\n"])] * 3, st.text(max_size=9)
    )
    | st.integers(1, 120).map("word ".__mul__)
)
WORDS = st.text("abc ", min_size=1, max_size=9).map(lambda text: f"w{text}")  # mostly good rows, too
TEXT = mostly(WORDS, TEXTS)
JUNK = st.none() | st.booleans() | st.integers(-3, 11) | st.floats() | st.lists(TEXT, max_size=2)
UNIT = mostly(st.floats(0, 1), JUNK)
CALL = st.fixed_dictionaries({"name": WORDS, "arguments": st.dictionaries(WORDS, TEXT | JUNK, max_size=2)})


def row(required: dict[str, Any], optional: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional or {})


def turns(
    role: str, content: str, names: tuple[str, str, str, str], calls: st.SearchStrategy[dict[str, Any]]
) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Mostly in the right order, with a system turn, with calls, or with anything anywhere."""
    system, user, assistant, tool = (st.fixed_dictionaries({role: st.just(name), content: TEXT}) for name in names)
    exchange = st.tuples(user, assistant)
    with_tool = st.tuples(user, calls, tool, assistant)
    body = st.lists(exchange | exchange | with_tool, max_size=4).map(lambda parts: [t for part in parts for t in part])
    parts = st.tuples(st.lists(system, max_size=1), body, st.lists(user, max_size=1))
    ordered = parts.map(lambda found: [turn for part in found for turn in part])
    return mostly(ordered, st.lists(user | assistant | system | calls | JUNK, max_size=4))


CALLS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.just(""), "tool_calls": st.lists(CALL, max_size=2)}
)
CALLED = st.fixed_dictionaries({"from": st.just("function_call"), "value": CALL.map(json.dumps)})
MESSAGES = turns("role", "content", ("system", "user", "assistant", "tool"), CALLS)
SPOKEN = turns("from", "value", ("system", "human", "gpt", "observation"), CALLED)
TOOLS = st.lists(st.fixed_dictionaries({"name": WORDS}, optional={"description": TEXT}), max_size=2)
ANSWER = TEXT | st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}).map(lambda turn: [turn])
DIALOGUES = st.lists(TEXT, min_size=2, max_size=4).map(
    lambda said: "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {text}" for index, text in enumerate(said))
)


@st.composite
def dialogue_pairs(draw: st.DrawFn) -> dict[str, Any]:
    """Two dialogues with one beginning."""
    start = draw(DIALOGUES) + "\n\nHuman: " + draw(TEXT)
    return {side: f"{start}\n\nAssistant: {draw(TEXT)}" for side in ("chosen", "rejected")}


ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "jsonl": row({"prompt": TEXT, "response": TEXT}, {"score": UNIT, "label": JUNK, "meta": JUNK})
    | row({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}, {"score_chosen": UNIT, "score_rejected": UNIT})
    | row({"messages": MESSAGES}, {"tools": TOOLS, "response": TEXT, "chosen": TEXT, "rejected": TEXT}),
    "trl": row({"messages": MESSAGES}, {"tools": TOOLS | TOOLS.map(json.dumps)})
    | row({"prompt": TEXT | MESSAGES, "completion": ANSWER}, {"label": mostly(st.booleans(), JUNK)})
    | row({"chosen": ANSWER | MESSAGES, "rejected": ANSWER | MESSAGES}, {"prompt": TEXT | MESSAGES}),
    "ultrachat": row({"messages": MESSAGES}, {"prompt": TEXT}),
    "alpaca": row(
        {"instruction": TEXT, "output": TEXT},
        {"input": TEXT, "system": TEXT, "history": st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=3) | JUNK},
    ),
    "sharegpt": row({"conversations": SPOKEN}, {"system": TEXT, "tools": TOOLS.map(json.dumps), "label": st.booleans()})
    | row(
        {"conversations": SPOKEN, **dict.fromkeys(("chosen", "rejected"), row({"from": st.just("gpt"), "value": TEXT}))}
    ),
    "helpsteer2": row(
        {"prompt": TEXT, "response": TEXT}
        | dict.fromkeys(("helpfulness", "correctness", "coherence"), mostly(st.integers(0, 4), JUNK))
    ),
    "helpsteer2_preference": row(
        {
            "prompt": TEXT,
            "response_1": TEXT,
            "response_2": TEXT,
            "preference_strength": mostly(st.integers(-3, 3), JUNK),
        }
    ),
    "ultrafeedback": row(
        {
            "instruction": TEXT,
            "completions": mostly(
                st.lists(row({"response": TEXT, "overall_score": st.integers(1, 10)}), min_size=1, max_size=3),
                JUNK,
            ),
        }
    ),
    "ultrafeedback_binarized": row(
        {
            "prompt": TEXT,
            "chosen": mostly(TEXT, MESSAGES),
            "rejected": mostly(TEXT, MESSAGES),
            "score_chosen": st.integers(5, 10),
            "score_rejected": st.integers(1, 7),
        }
    ),
    "hh_rlhf": dialogue_pairs() | dialogue_pairs() | row({"chosen": DIALOGUES, "rejected": DIALOGUES}),
    "kto": row({"prompt": TEXT | MESSAGES, "completion": ANSWER, "label": mostly(st.booleans(), JUNK)})
    | row({"messages": MESSAGES, "label": st.booleans()}, {"tools": TOOLS}),
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("templates")
    found = {}
    for name, template in TEMPLATES.items():
        build = build_sentencepiece_like if name == "inst" else build_tiny_tokenizer
        (folder / "template.jinja").write_text(template)
        found[name] = load_tokenizer(str(build(folder / name)), chat_template=str(folder / "template.jinja"))
    return found


def test_every_format_has_rows() -> None:
    """A new format must be tried here, too."""
    assert set(ROWS) == set(FORMATS)


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
@settings(max_examples=150, deadline=None)
@given(data=st.data(), template=st.sampled_from(list(TEMPLATES)), rules=RULES)
def test_any_row(
    chats: dict[str, ChatTokenizer], name: str, data: st.DataObject, template: str, rules: RowRules
) -> None:
    """Nothing but a ValueError, no response lost or doubled, and each span the text of a response and no other."""
    given_row = data.draw(ROWS[name])
    chat, rules = chats[template], replace(rules, format=name)
    try:
        kind, units, dropped, changed = examine_row(given_row, rules, format_named(name), chat, file=0, line=1)
    except ValueError:
        return
    items = items_of(given_row, rules)
    responses = [response for unit, _ in units for sequence in unit for response in sequence.responses]
    if items is None:
        assert (kind, units, sum(dropped.values()) in (0, 2)) == (None, [], True)
        return
    assert len(responses) + sum(dropped.values()) == sum(item.num_responses for item in items)
    assert set(dropped) <= {LONG, CONTROL, EQUAL, "tie"}
    assert set(changed) <= ({TRIMMED} if rules.trim_prompt else set())
    if isinstance(items[0], Pair):
        assert kind == ("pair with scores" if items[0].scored else "pair")
    else:
        assert kind == items[0].kind
    for unit, _ in units:
        is_pair = isinstance(items[0], Pair) and not rules.split_pairs
        assert len(unit) == (2 if is_pair else 1)
        for sequence in unit:
            assert sequence.num_tokens <= rules.max_length
            assert sequence.num_tokens == sequence.responses[-1].end
    check_spans(units, items, template, chat)


def items_of(given_row: Mapping[str, Any], rules: RowRules) -> list[Example | Pair] | None:
    try:
        return list(format_named(rules.format)(given_row, score=rules.score))
    except LeftOut:
        return None


def check_spans(units: list[Any], items: list[Example | Pair], template: str, chat: ChatTokenizer) -> None:
    """Each span, with what stands in the text right before it, is an answer of the row, each answer at most once."""
    answers = [
        written(message.content, template)
        for item in items
        for example in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
        for message in example.messages
        if message.score is not None
    ]
    control = {chat.tokenizer.convert_tokens_to_ids(token) for token in chat.control_tokens}
    for unit, _ in units:
        for sequence in unit:
            last_end = 0
            for response in sequence.responses:
                ids = sequence.token_ids_T[response.start : response.end].tolist()
                assert 0 <= last_end < response.start < response.end <= sequence.num_tokens
                last_end = response.end
                assert ids[-1] == chat.end_of_turn_id
                assert not control & set(ids[:-1])
                text = chat.tokenizer.decode(ids[:-1])
                if template == "inst":  # SentencePiece adds spaces
                    text = text.lstrip(" ")
                assert text in answers
                answers.remove(text)


def written(answer: str, template: str) -> str:
    """What a model would have to write for this answer, by this template; an empty thought is prompt."""
    if template == "trims":
        answer = answer.strip()
    if template == "opens thought" and answer.startswith("<think>\n"):
        answer = re.sub(r"\A\s*</think>\n{0,2}", "", answer.removeprefix("<think>\n"))
    else:
        answer = re.sub(r"\A\s*<think>\s*</think>\n{0,2}", "", answer)  # more white space is the answer's
    if template == "inst":  # it reads ASCII alone, and ▁ as a space
        return "".join(c for c in answer.replace("▁", " ") if c in "\n\t" or " " <= c <= "~").lstrip(" ")
    return answer


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_are_mostly_examined(chats: dict[str, ChatTokenizer], name: str) -> None:
    """The rows above reach the tokenizer in every format: a strategy of bad rows alone would prove nothing."""
    rules = RowRules(name, None, 400, merge=True, trim_prompt=True)
    num_good = 0  # of 100

    @settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @given(ROWS[name])
    def count(given_row: dict[str, Any]) -> None:
        nonlocal num_good
        try:
            _, units, _, _ = examine_row(given_row, rules, format_named(name), chats["chatml"], file=0, line=1)
        except ValueError:
            return
        num_good += bool(units)

    count()
    assert num_good >= 6
