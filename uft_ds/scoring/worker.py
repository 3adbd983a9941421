"""The process that a user's function runs in: `python -m uft_ds.scoring.worker KIND TARGET SECONDS`.

It reads one JSON object a line from standard input and answers each by one on the descriptor that was standard output;
what the function prints goes to standard error.

    {"messages": [{role, content}, ...], "response": text, "meta": {...}}  ->  {"value": number} or {"reason": text}

The first line that it writes says whether the function could be imported: {"ready": true} or {"unusable": text}.

It ends with its standard input. The parent kills it if an item takes too long; if the parent itself has been killed, an
alarm does, whose default action no loop can hold up. (The death of a parent is no signal to use here: Linux sends it
when the thread that started the process ends.)
"""

from __future__ import annotations

import importlib
import json
import numbers
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_IMPORT_SECONDS = 180.0
_LATER_SECONDS = 2.0
"""The alarm comes after the parent's own limit."""
_MOST_LETTERS = 10_000
"""Of a reason that is sent; the parent shortens it further, for people."""

Function = Callable[[list[dict[str, Any]], str, dict[str, Any]], Any]


def imported(target: str) -> Function:
    """The function that `package.module:function` names; the working directory may hold the module.

    Raises:
        ValueError: says what is wrong with the name. Exception: of the user's module, while it is imported.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"found {target!r}, expected package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(value, part):
            raise ValueError(f"module {module} has no {name!r}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{target} is not a function, but {type(value).__name__}")
    return value


def pattern_function(pattern: str) -> Function:
    """1 or 0, whether a pattern is found in the response; with a group, the number that the first group holds."""
    compiled = re.compile(pattern)

    def score(messages: list[dict[str, Any]], response: str, meta: dict[str, Any]) -> float:
        match = compiled.search(response)
        if not compiled.groups:
            return float(match is not None)
        if match is None or match.group(1) is None:
            raise ValueError("the pattern, which has a group for the score, is not found")
        try:
            return float(match.group(1))
        except ValueError:
            found = f"the pattern's first group holds {match.group(1)!r:.40}"
            raise ValueError(f"{found}, expected a number; a group that is no score is (?:...)") from None

    return score


def function_of(kind: str, target: str) -> Function:
    """The function of `code` or `regex`."""
    return imported(target) if kind == "code" else pattern_function(target)


def judged(function: Function, item: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one item; whatever the function raises is the reason of a failure."""
    try:
        value = function(item["messages"], item["response"], item["meta"])
        if value is None:
            return {"reason": "the function returned None"}
        # numpy's truth value is no Real; its type is called `bool_` before numpy 2, and `bool` from then on.
        if not isinstance(value, numbers.Real) and type(value).__name__ not in ("bool_", "bool"):
            return {"reason": f"the function returned {value!r:.80}, expected a number or None"}
        return {"value": float(value)}  # an integer of 400 digits is no float
    except Exception as error:  # noqa: BLE001 - the user's code, its exceptions' and values' own texts too
        return {"reason": f"{type(error).__name__}: {_text_of(error)}"[:_MOST_LETTERS]}


def _text_of(error: Exception) -> str:
    """What an exception says; its own method may raise."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the user's code
        return "its text cannot be read"


def main(kind: str, target: str, seconds: str) -> None:
    """Answer lines until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of the function do not mix with the answers
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor does it read the items

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        signal.setitimer(signal.ITIMER_REAL, _IMPORT_SECONDS)
        function = function_of(kind, target)
    except BaseException as error:  # noqa: BLE001 - importing the user's module may do anything, sys.exit too
        answer({"unusable": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    limit, this = float(seconds) + _LATER_SECONDS, os.getpid()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in lines:
        signal.setitimer(signal.ITIMER_REAL, limit)
        value = judged(function, json.loads(line))
        if os.getpid() != this:  # a child that the function forked has come here too: its value is nobody's
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            answer(value)
        except BrokenPipeError:  # the parent was killed meanwhile, and nobody waits for it
            os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
