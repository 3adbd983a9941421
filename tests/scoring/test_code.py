"""A user's function, in a process of its own: what it returns, and what it may do without harm to others."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from uft_ds.data.example import Message
from uft_ds.errors import UserError
from uft_ds.scoring.code import CodeScorer
from uft_ds.scoring.item import Item, Judgement

MODULE = """
import os, signal, sys, time

def f(messages, response, meta):
    print("noise on standard output")
    if response == "slow":
        time.sleep(60)
    if response == "loop":
        while True:
            pass
    if response == "exit":
        os._exit(7)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "talk":
        raise ValueError("so many\\nwords " * 99)
    if response == "input":
        return float(len(sys.stdin.read()))
    return meta.get(response, len(messages))

values = {"nan": float("nan"), "none": None, "text": "1", "true": True, "list": [1], "inf": float("inf"), "half": 0.5}

def g(messages, response, meta):
    return values[response]

class Unreadable(Exception):
    def __str__(self):
        raise ValueError("no text")
    __repr__ = __str__

def odd(messages, response, meta):
    if response == "huge":
        return 10**400
    if response == "unreadable":
        raise Unreadable
    if response == "opaque":
        return Unreadable()
    if response == "numpy":
        import numpy
        return numpy.bool_(True)

def forks(messages, response, meta):
    child = os.fork()
    if child == 0:
        if response == "raise":
            raise ValueError("in the child")
        return -1.0
    os.waitpid(child, 0)
    return float(len(response))

def echo(messages, response, meta):
    assert messages[-1]["role"] == "user"
    return float(response)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)


def item(response: str, **meta: object) -> Item:
    return Item("rows.jsonl:1", (Message("system", "s"), Message("user", "q")), response, meta)


def scored(target: str, responses: list[str], *, seconds: float = 20.0, workers: int = 1) -> list[Judgement]:
    scorer = CodeScorer("code", target, seconds=seconds, workers=workers)
    try:
        return scorer.score([item(response) for response in responses])
    finally:
        scorer.close()


def test_a_function_is_given_the_prompt_the_response_and_meta() -> None:
    """Here it counts the prompt's turns, or looks a value up in meta; its prints go nowhere."""
    scorer = CodeScorer("code", "ours:f", seconds=20, workers=1)
    try:
        assert [one.value for one in scorer.score([item("x"), item("key", key=0.25), item("input")])] == [
            2.0,
            0.25,
            0.0,
        ]
    finally:
        scorer.close()


def test_what_is_no_number_is_a_failure_with_its_reason() -> None:
    """None, NaN, infinity, text and lists; true and false are 1 and 0."""
    found = dict(
        zip(names := ["nan", "none", "text", "true", "list", "inf", "half"], scored("ours:g", names), strict=True)
    )
    assert {name: one.value for name, one in found.items() if one.value is not None} == {"true": 1.0, "half": 0.5}
    assert "nan" in found["nan"].reason
    assert "None" in found["none"].reason
    assert "'1'" in found["text"].reason


def test_a_value_that_is_odd_neither_ends_the_process_nor_is_lost() -> None:
    """Texts that cannot be made, a number that is no float: each a failure. numpy's True is 1."""
    huge, unreadable, opaque, truth = scored("ours:odd", ["huge", "unreadable", "opaque", "numpy"])
    assert "OverflowError" in huge.reason
    assert unreadable.reason == "Unreadable: its text cannot be read"
    assert "ValueError: no text" in opaque.reason
    assert truth.value == 1.0


def test_a_child_that_a_function_forks_answers_nothing() -> None:
    """It returns from the function as its parent does, or raises; its line would be taken for the next item's."""
    found = scored("ours:forks", ["a", "bb", "raise", "dddd"])
    assert [one.value for one in found] == [1, 2, 5, 4]


def test_a_function_that_ends_its_process_costs_one_item() -> None:
    """Too slow, an exit, a crash, an exception: each its own reason on one line, and the items between are scored."""
    responses = ["a", "slow", "b", "exit", "c", "crash", "d", "raise", "e", "talk"]
    found = scored("ours:f", responses, seconds=1.0)
    assert [one.value for one in found] == [2, None, 2, None, 2, None, 2, None, 2, None]
    assert [one.reason for one in found if one.reason] == [
        "not done after 1 s (its process was killed)",
        "its process ended with exit code 7",
        "its process was ended by SIGSEGV",
        "KeyError: 'no such thing'",
        "ValueError: " + "so many words " * 34 + "so many ...",
    ]


def test_several_processes_keep_the_order() -> None:
    """Items are shared out as processes are free; the answers are in the items' order."""
    found = scored("ours:echo", [str(number) for number in range(40)], workers=3)
    assert [one.value for one in found] == list(range(40))


def test_no_process_is_left() -> None:
    """After a loop that nothing but a signal ends, and after `close`."""
    scored("ours:f", ["a", "loop"], seconds=0.5, workers=2)
    assert [
        child for child in psutil.Process().children() if "uft_ds.scoring.worker" in " ".join(child.cmdline())
    ] == []


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ours", "expected package.module:function"),
        ("nowhere:f", "no module nowhere"),
        ("ours:h", "has no 'h'"),
        ("ours:values", "is not a function"),
        ("broken:f", "nowhere_at_all"),
        ("leaves:f", "SystemExit"),
        ("no.package:f", "cannot be imported"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(target: str, said: str) -> None:
    """With the reason, before any item."""
    with pytest.raises(UserError, match=said):
        scored(target, ["a"])


def test_another_version_of_the_module_is_another_scorer(tmp_path: Path) -> None:
    """By the content of its file."""
    before = CodeScorer("code", "ours:f", seconds=1, workers=1).identity()
    (tmp_path / "ours.py").write_text(MODULE + "\n")
    assert CodeScorer("code", "ours:f", seconds=1, workers=1).identity() != before


def test_a_module_that_changes_meanwhile_is_not_used(tmp_path: Path) -> None:
    """A process that is started again would import the new one, and its scores bear the old one's name."""
    scorer = CodeScorer("code", "ours:f", seconds=20, workers=1)
    try:
        scorer.score([item("a"), item("exit")])
        (tmp_path / "ours.py").write_text(MODULE + "\n")
        with pytest.raises(UserError, match="ours:f: the file has changed"):
            scorer.score([item("b")])
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("pattern", "response", "value"),
    [
        ("pri.e", "a prime", 1.0),
        ("prime", "seven", 0.0),
        (r"= (-?\d+)", "x = -4", -4.0),
        (r"= (\d+)", "x", None),
        ("= (.)", "= y", None),
    ],
)
def test_a_pattern_gives_one_or_zero_or_its_groups_number(pattern: str, response: str, value: float | None) -> None:
    """A group that is not there, or holds no number, is a failure."""
    scorer = CodeScorer("regex", pattern, seconds=20, workers=1)
    try:
        (found,) = scorer.score([item(response)])
    finally:
        scorer.close()
    assert found.value == value


def test_a_pattern_without_end_is_stopped() -> None:
    """(?:a+)+$ on a long text that ends otherwise takes longer than the sun lasts; and a broken pattern is refused."""
    scorer = CodeScorer("regex", "(?:a+)+$", seconds=0.5, workers=1)
    start = time.monotonic()
    try:
        slow, fast = scorer.score([item("a" * 60 + "b"), item("aaa")])
    finally:
        scorer.close()
    assert (slow.value, fast.value) == (None, 1.0)
    assert time.monotonic() - start < 15
    with pytest.raises(UserError, match="is no pattern"):
        CodeScorer("regex", "(", seconds=1, workers=1)
