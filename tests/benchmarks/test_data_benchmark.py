"""The data benchmark's own arithmetic; its numbers are only as good."""

import mmap
import os
import runpy
import time
from pathlib import Path

import pytest
from data_million import sampling
from data_preparation import timing_stages
from data_rows import joined_conversations, repeated
from data_tokens import padded_tokens
from process_costs import own_bytes, status_bytes

from uft_ds.data.store import building


def answered(number: int) -> dict:
    prompt, answer = ({"role": role, "content": f"{role} {number}"} for role in ("user", "assistant"))
    return {"prompt": [prompt], "completion": [answer]}


def test_the_script_has_every_part_that_it_describes() -> None:
    """`--only` takes the names of the docstring's list, in its order."""
    # By its path: tests/data would be found by the name `data` too.
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "data.py"))
    described = [line.split()[0] for line in script["__doc__"].splitlines() if line[:4] == " " * 4 and line[4] != " "]
    assert list(script["PARTS"]) == described[1:] == ["prepare", "packing", "tokens", "million"]


def test_padded_tokens_by_hand() -> None:
    """Rows of 3, 5, 2 | 4, 1 tokens, three at a time: 3 x 5 + 2 x 4 = 23; the last group is not filled up."""
    assert padded_tokens([3, 5, 2, 4, 1], 3) == 23
    assert padded_tokens(iter([7]), 8) == 7


def test_conversations_use_each_row_once() -> None:
    """Joined conversations have 2 to 4 answers, turns alternate, and no row is in two of them or torn apart."""
    conversations = joined_conversations([answered(i) for i in range(50)], (2, 4), seed=0)
    turns = [conversation["messages"] for conversation in conversations]
    assert {len(messages) // 2 for messages in turns} == {2, 3, 4}
    asked = [m["content"].split()[1] for messages in turns for m in messages if m["role"] == "user"]
    said = [m["content"].split()[1] for messages in turns for m in messages if m["role"] == "assistant"]
    assert asked == said
    assert len(set(asked)) == len(asked) >= 50 - 4


def test_repeated_rows_all_differ() -> None:
    """Three rows repeated to seven: numbers in the prompt, answers as they were, the originals untouched."""
    rows = [answered(i) for i in range(3)]
    found = repeated(rows, 7)
    assert [row["prompt"][0]["content"] for row in found][-1] == "6. user 0"
    assert len({row["prompt"][0]["content"] for row in found}) == 7
    assert found[4]["completion"] == rows[1]["completion"]
    assert rows == [answered(i) for i in range(3)]


def test_stages_are_timed_and_put_back() -> None:
    """A call inside counts, one outside does not, and the function is the old one afterwards."""
    before = building.parse_row
    with timing_stages() as seconds:
        assert building.parse_row is not before
        assert building.parse_row(b'{"a": 1}') == {"a": 1}
    counted = seconds["parse JSON"]
    assert counted > 0
    assert building.parse_row is before
    before(b'{"a": 1}')
    assert seconds["parse JSON"] == counted


def test_sampled_peak_is_of_memory_that_was_given_back() -> None:
    """64 MB that are written and dropped inside count towards the growth; 64 MB more are not found."""
    with sampling(every=0.005) as memory:
        # An array would not do: the allocator may place it in memory that earlier tests have left to this process.
        held = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.write(b"1" * len(held))
        # The sampler is a thread of a busy machine: it is given until it has looked, not a fixed time.
        deadline = time.monotonic() + 30
        while memory.growth < 60e6 and time.monotonic() < deadline:
            time.sleep(0.005)
        held.close()
    assert 60e6 < memory.growth < 120e6


def test_status_of_a_process_that_has_ended_is_zero() -> None:
    """Workers end while they are sampled."""
    assert status_bytes(os.getpid(), "VmHWM") > 10e6
    assert status_bytes(2**22 + 1, "VmHWM") == 0


def test_a_number_that_the_system_does_not_give_is_an_error() -> None:
    """Of this process itself, whose memory is never nothing."""
    assert own_bytes("VmHWM") > 10e6
    with pytest.raises(RuntimeError, match="no VmNone"):
        own_bytes("VmNone")
