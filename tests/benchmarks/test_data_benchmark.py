"""The data benchmark's own arithmetic; its numbers are only as good."""

import importlib.util
import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from uft_ds.data.store import building


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    # By its path: tests/data would be found by the name `data` too.
    path = Path(__file__).parents[2] / "benchmarks" / "data.py"
    spec = importlib.util.spec_from_file_location("data_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answered(number: int) -> dict:
    prompt, answer = ({"role": role, "content": f"{role} {number}"} for role in ("user", "assistant"))
    return {"prompt": [prompt], "completion": [answer]}


def test_padded_tokens_by_hand(benchmark: ModuleType) -> None:
    """Rows of 3, 5, 2 | 4, 1 tokens, three at a time: 3 x 5 + 2 x 4 = 23; the last group is not filled up."""
    assert benchmark.padded_tokens([3, 5, 2, 4, 1], 3) == 23
    assert benchmark.padded_tokens(iter([7]), 8) == 7


def test_conversations_use_each_row_once(benchmark: ModuleType) -> None:
    """Joined conversations have 2 to 4 answers, turns alternate, and no row is in two of them or torn apart."""
    conversations = benchmark.joined_conversations([answered(i) for i in range(50)], (2, 4), seed=0)
    turns = [conversation["messages"] for conversation in conversations]
    assert {len(messages) // 2 for messages in turns} == {2, 3, 4}
    asked = [m["content"].split()[1] for messages in turns for m in messages if m["role"] == "user"]
    said = [m["content"].split()[1] for messages in turns for m in messages if m["role"] == "assistant"]
    assert asked == said
    assert len(set(asked)) == len(asked) >= 50 - 4


def test_repeated_rows_all_differ(benchmark: ModuleType) -> None:
    """Three rows repeated to seven: numbers in the prompt, answers as they were, the originals untouched."""
    rows = [answered(i) for i in range(3)]
    found = benchmark.repeated(rows, 7)
    assert [row["prompt"][0]["content"] for row in found][-1] == "6. user 0"
    assert len({row["prompt"][0]["content"] for row in found}) == 7
    assert found[4]["completion"] == rows[1]["completion"]
    assert rows == [answered(i) for i in range(3)]


def test_stages_are_timed_and_put_back(benchmark: ModuleType) -> None:
    """A call inside counts, one outside does not, and the function is the old one afterwards."""
    before = building.parse_row
    with benchmark.timing_stages() as seconds:
        assert building.parse_row is not before
        assert building.parse_row(b'{"a": 1}') == {"a": 1}
    counted = seconds["parse JSON"]
    assert counted > 0
    assert building.parse_row is before
    before(b'{"a": 1}')
    assert seconds["parse JSON"] == counted


def test_sampled_peak_is_of_memory_that_was_given_back(benchmark: ModuleType) -> None:
    """64 MB that are written and dropped inside count towards the growth; 64 MB more are not found."""
    with benchmark.sampling(every=0.005) as memory:
        # An array would not do: the allocator may place it in memory that earlier tests have left to this process.
        held = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.write(b"1" * len(held))
        # The sampler is a thread of a busy machine: it is given until it has looked, not a fixed time.
        deadline = time.monotonic() + 30
        while memory.growth < 60e6 and time.monotonic() < deadline:
            time.sleep(0.005)
        held.close()
    assert 60e6 < memory.growth < 120e6


def test_status_of_a_process_that_has_ended_is_zero(benchmark: ModuleType) -> None:
    """Workers end while they are sampled."""
    assert benchmark.status_bytes(os.getpid(), "VmHWM") > 10e6
    assert benchmark.status_bytes(2**22 + 1, "VmHWM") == 0
