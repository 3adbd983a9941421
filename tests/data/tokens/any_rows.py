"""Rows of every format, mostly good ones: hypothesis strategies by the format's name."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st


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
    "prompts": row({"prompt": TEXT | MESSAGES}, {"solution": JUNK, "meta": JUNK})
    | row({"messages": MESSAGES}, {"tools": TOOLS, "solution": TEXT}),
}
