"""The data pipeline on real rows: speed of preparation, packing, tokens forwarded, memory at a million rows.

    python benchmarks/data.py [--data FOLDER] [--rows 500000] [--only prepare,packing,tokens,million]

    prepare  examples/s from a jsonl file to tokens that are ready to train on, beside TRL's own preparation of the
             same file; rounds alternate, medians; CPU time is that of all processes, their start included
    packing  micro-steps above the bound, fill, and how even ranks are, on steps of real lengths
    tokens   forwarded per response, beside rows that are padded as peers pad them, and with prompts shared
    million  memory and time of a long source, and of a tenth of it; --rows 1000000 takes 12 minutes

Needs real data (--data, or UFT_TEST_DATA) and a real tokenizer: Qwen2.5's, from a package of the package index, or
else the one of the quickstart's model. TRL comes with the extra `bench`; without it that half is left out, and said.
About 20 minutes on two cores. Times on a shared machine mean little, ratios within a run
more. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pytest
from balance import imbalance
from pools import Mixed
from real_tokenizers import qwen25_tokenizer
from rich.console import Console
from rich.table import Table
from sources import rules, write_rows

from uft_ds.data.bins import fewest_micro_steps
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import plan_steps
from uft_ds.data.packing import Packing, pack
from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.store import building
from uft_ds.data.store.sequences import Selection, TokenStore
from uft_ds.data.together import TogetherSource
from uft_ds.data.tokens import chat_template
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.examples.smollm2 import NAME, default_cache_dir

MAX_LENGTH = 2048
ROWS_PADDED_TOGETHER = 8
ROWS = 500_000

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A claim, what was measured, and whether it holds."""

    claim: str
    value: float
    holds: bool


def at_most(claim: str, value: float, bound: float) -> Bar:
    return Bar(f"{claim} <= {bound:g}", value, value <= bound)  # a NaN does not hold


# ---- real rows, in TRL's layouts, which both sides read


def instruction_rows(data: Path) -> list[Row]:
    """Alpaca's instructions with GPT-4's answers."""
    rows = json.loads((data / "llama_factory" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return [_answered("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]


def problem_rows(data: Path) -> list[Row]:
    """Problems of GSM8K with their solutions."""
    return [_answered(row["question"], row["answer"]) for row in _lines(data / "gsm8k" / "train.jsonl")]


def pair_rows(data: Path) -> list[Row]:
    """UltraFeedback as it is: some answers are empty, some pairs equal."""
    return [
        {"prompt": [_turn("user", row["prompt"])]}
        | {side: [_turn("assistant", row[side])] for side in ("chosen", "rejected")}
        for row in _lines(data / "ultrafeedback" / "train_clean.jsonl")
    ]


def _answered(question: str, answer: str) -> Row:
    return {"prompt": [_turn("user", question)], "completion": [_turn("assistant", answer)]}


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def joined_conversations(rows: Seq[Row], num_turns: tuple[int, int], seed: int) -> list[Row]:
    """Conversations of so many answers (both bounds included, each as likely), each of consecutive shuffled rows.

    Every row is used once; too few at the end are left out.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows)).tolist()
    conversations = []
    while len(order) >= (count := int(rng.integers(num_turns[0], num_turns[1] + 1))):
        taken, order = order[:count], order[count:]
        conversations.append({"messages": [turn for i in taken for turn in rows[i]["prompt"] + rows[i]["completion"]]})
    return conversations


def repeated(rows: Seq[Row], count: int) -> list[Row]:
    """So many rows, each with its own number in the prompt."""
    return [
        row | {"prompt": [_turn("user", f"{number}. {row['prompt'][0]['content']}")]}
        for number, row in zip(range(count), itertools.cycle(rows), strict=False)
    ]


def prepared(path: Path, chat: ChatTokenizer, cache: Path, *, workers: int = 1, **changes: Any) -> PreparedSource:
    return prepare_source(
        SourceSettings(str(path), None, rules(**{"format": "trl", "max_length": MAX_LENGTH} | changes)),
        chat,
        cache,
        seed=0,
        tolerance=Tolerance(quarantine=True),
        workers=workers,
    )


# ---- 1. preparation


@dataclass
class Timing:
    """Of one way to prepare a file: seconds of each round, and of the processor over all its processes."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    kept: int = 0
    """Responses."""
    supervised: int = 0
    """Tokens."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def cpu(self) -> float:
        return float(np.median(self.cpu_seconds))


def prepare_ours(path: Path, chat: ChatTokenizer, cache: Path, workers: int) -> tuple[int, int]:
    """Responses kept, and supervised tokens."""
    selection = prepared(path, chat, cache, workers=workers).selection
    responses = selection.store.responses
    return selection.num_responses, int((responses["end"] - responses["start"]).sum())


def prepare_by_trl(path: Path, chat: ChatTokenizer, cache: Path, processes: int | None) -> tuple[int, int]:
    """By the trainers' own method, of which only the model and its loop are left out."""
    import datasets
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    of_pairs = "chosen" in rows.column_names
    config: Any = (DPOConfig if of_pairs else SFTConfig)(
        output_dir=str(cache), max_length=MAX_LENGTH, dataset_num_proc=processes, report_to="none", bf16=False
    )
    if of_pairs:
        trainer = SimpleNamespace(_tokenizer=chat.tokenizer)
        found = DPOTrainer._prepare_dataset(trainer, rows, chat.tokenizer, config, "train")
        return 2 * len(found), sum(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in found[side])
    trainer = SimpleNamespace(_tokenizer=chat.tokenizer, chat_template=None, completion_only_loss=True)
    found = SFTTrainer._prepare_dataset(trainer, rows, chat.tokenizer, config, False, None, "train")
    return len(found), sum(label != -100 for labels in found["labels"] for label in labels)


def measure_preparation(path: Path, chat: ChatTokenizer, rounds: int) -> dict[str, Timing]:
    """All ways in turn, so often; counting TRL's tokens is not timed, reading the file is."""
    ways: dict[str, Callable[[Path], tuple[int, int]]] = {
        "uft_ds, 1 process": lambda cache: prepare_ours(path, chat, cache, 1),
        "uft_ds, 2 workers": lambda cache: prepare_ours(path, chat, cache, 2),
    }
    if release("trl"):
        ways |= {
            "TRL, 1 process": lambda cache: prepare_by_trl(path, chat, cache, None),
            "TRL, num_proc=2": lambda cache: prepare_by_trl(path, chat, cache, 2),
        }
    timings = {name: Timing() for name in (*ways, "uft_ds, warm cache")}
    for _ in range(rounds):
        for name, run in ways.items():
            with tempfile.TemporaryDirectory() as cache:
                _timed(timings[name], lambda run=run, cache=cache: run(Path(cache)))  # type: ignore[misc]
                if name == "uft_ds, 1 process":
                    _timed(timings["uft_ds, warm cache"], lambda cache=cache: prepare_ours(path, chat, Path(cache), 1))  # type: ignore[misc]
    return timings


def _timed(timing: Timing, run: Callable[[], tuple[int, int]]) -> None:
    start, cpu = time.perf_counter(), _cpu_seconds()
    timing.kept, timing.supervised = run()
    timing.seconds.append(time.perf_counter() - start)
    timing.cpu_seconds.append(_cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process and of those it started, which are waited for: until then theirs are not known."""
    while multiprocessing.active_children():
        time.sleep(0.05)
    return sum(os.times()[:4])


STAGES: dict[str, tuple[Any, str]] = {
    "parse JSON": (building, "parse_row"),
    "render the template": (chat_template, "render_jinja_template"),
    "tokenize": (ChatTokenizer, "encode"),
    "search for control tokens": (ChatTokenizer, "holds_control_token"),
    "arrays and keys": (building, "pack_units"),
    "examine rows, with all of these": (building, "examine_row"),
}
"""What of a row's way is timed, by the functions that do it."""


@contextmanager
def timing_stages() -> Iterator[dict[str, float]]:
    """Seconds inside each stage of this process; a clock around each call, no profiler."""
    seconds: Counter[str] = Counter()

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(mock.patch.object(owner, name, clocked(stage, getattr(owner, name))))
        yield seconds


def show_stages(console: Console, title: str, path: Path, chat: ChatTokenizer, num_rows: int, **changes: Any) -> None:
    with tempfile.TemporaryDirectory() as cache, timing_stages() as seconds:
        start = time.perf_counter()
        prepared(path, chat, Path(cache), **changes)
        seconds["in all"] = time.perf_counter() - start
    table = _table(f"where the time goes in one process: {title}", "", "us a row", "share")
    for stage in (*STAGES, "in all"):
        table.add_row(
            stage, f"{seconds[stage] / num_rows * 1e6:.0f}", f"{seconds[stage] / seconds['in all']:.0%}"
        )  # fmt: skip
    console.print(table)


def report_preparation(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    files = {
        "instruction": write_rows(folder / "instruction.jsonl", repeated(instruction_rows(data), options.prepare_rows)),
        "pairs": write_rows(folder / "pairs.jsonl", repeated(pair_rows(data), options.prepare_rows // 4)),
    }
    if not release("trl"):
        console.print("TRL is not installed (extra `bench`): measured without it")
    else:
        import datasets
        from trl import DPOTrainer, SFTTrainer  # noqa: F401 - imported before the clock runs

        datasets.disable_progress_bars()
        datasets.disable_caching()
    bars = []
    for name, path in files.items():
        num_rows = sum(1 for _ in path.open(encoding="utf-8"))
        timings = measure_preparation(path, chat, options.rounds)
        title = f"preparing {num_rows} rows: {name} ({path.stat().st_size / 1e6:.0f} MB), {options.rounds} rounds"
        table = _table(
            title, "", "rows/s", "seconds", "/ uft_ds", "CPU us a row", "/ uft_ds", "responses", "supervised tokens"
        )
        for way, timing in timings.items():
            reference = timings["uft_ds, 2 workers" if "2" in way else "uft_ds, 1 process"]
            table.add_row(
                way, f"{num_rows / timing.median:.0f}", f"{timing.median:.1f}",
                f"{timing.median / reference.median:.2f}",
                f"{timing.cpu / num_rows * 1e6:.0f}",
                f"{timing.cpu / reference.cpu:.2f}",
                str(timing.kept), str(timing.supervised),
            )  # fmt: skip
        console.print(table)
        if "TRL, 1 process" in timings:
            # No bar on two processes: at this size it is their start that is measured.
            ratio = timings["uft_ds, 1 process"].cpu / timings["TRL, 1 process"].cpu
            bars.append(at_most(f"preparing {name}: CPU time in one process / TRL's", ratio, 1.0))
        show_stages(console, name, path, chat, num_rows)
    single = repeated(instruction_rows(data), options.prepare_rows // 4)
    conversations = write_rows(folder / "conversations.jsonl", joined_conversations(single, (2, 7), seed=0))
    count = sum(1 for _ in conversations.open(encoding="utf-8"))
    for merge in (True, False):
        title = f"{count} conversations of 2 to 7 answers, {'merged' if merge else 'unfolded'}"
        show_stages(console, title, conversations, chat, count, merge=merge)
    return bars


# ---- 2. packing


@dataclass(frozen=True)
class PackedStep:
    """What one step's packing came to."""

    source: str
    capacity: int
    ranks: int
    per_rank: int
    above: int
    """Micro-steps above the bound."""
    micro_steps: int
    fill: float
    totals: float
    waiting: float
    seconds: float
    sequences_per_rank: float


CAPACITIES, RANKS, PER_RANK = (2048, 4096, 16384), (1, 2, 8, 64), (16, 32)
PARITIES = {"Qwen2.5-32B": 95_000.0, "135M model": 6_100.0}
"""Tokens at which a sequence's attention costs as much as all the rest."""


def fitting(selection: Selection, capacity: int) -> Selection:
    """The units that one micro-batch can hold."""
    tokens_U = selection.store.tokens_U[selection.units_U]
    return Selection(selection.store, selection.units_U[tokens_U <= capacity])


def pack_steps(
    source: str, pools: Seq[Selection], *, capacity: int, ranks: int, per_rank: int, parity: float, num_steps: int
) -> list[PackedStep]:
    """Steps of a mixture, packed for all ranks."""
    ingredients = [Mixed(str(i), fitting(pool, capacity)) for i, pool in enumerate(pools)]
    steps = plan_steps(ingredients, seed=0, examples_per_step=per_rank * ranks, epochs=1, steps=num_steps)
    found = []
    for step in steps:
        start = time.perf_counter()
        packed = pack(step, tokens_per_micro_batch=capacity, world_size=ranks, packing=Packing(parity))
        seconds = time.perf_counter() - start
        lengths = [sum(sequence.num_tokens for sequence in unit) for unit in step.units]
        micro_steps = len(packed[0])
        totals, waiting = imbalance(packed, parity)
        found.append(
            PackedStep(
                source, capacity, ranks, per_rank,
                above=micro_steps - fewest_micro_steps(lengths, capacity, ranks),
                micro_steps=micro_steps,
                fill=sum(lengths) / (micro_steps * ranks * capacity),
                totals=totals, waiting=waiting, seconds=seconds,
                sequences_per_rank=len(step.sequences) / ranks,
            )
        )  # fmt: skip
    return found


def report_packing(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    rows = {"alpaca": instruction_rows(data), "gsm8k": problem_rows(data), "ultrafeedback": pair_rows(data)}
    stores = {
        name: prepared(write_rows(folder / f"{name}.jsonl", of), chat, folder / "cache", max_length=16_384).selection
        for name, of in rows.items()
    }
    sources = {name: [store] for name, store in stores.items()} | {"mixed": list(stores.values())}
    shown = _table("lengths", "", "units", "tokens: median", "mean", "longest")
    for name, pools in sources.items():
        tokens = np.concatenate([pool.store.tokens_U for pool in pools])
        shown.add_row(
            name, str(len(tokens)), f"{np.median(tokens):.0f}", f"{tokens.mean():.0f}", str(tokens.max())
        )  # fmt: skip
    console.print(shown)
    bars = []
    for model, parity in PARITIES.items():
        found = [
            step
            for name, capacity, ranks, per_rank in itertools.product(sources, CAPACITIES, RANKS, PER_RANK)
            for step in pack_steps(
                name, sources[name], capacity=capacity, ranks=ranks, per_rank=per_rank, parity=parity,
                num_steps=options.steps if ranks <= 8 else -(-options.steps // 4),
            )
        ]  # fmt: skip
        for keys in (("capacity", "ranks", "per_rank"), ("source", "capacity")):
            console.print(packing_table(f"parity {parity:g} tokens ({model}); medians, worst in brackets", keys, found))
        bars.append(at_most(f"parity {parity:g}: micro-steps above the bound", max(s.above for s in found), 1))
        if model == "Qwen2.5-32B":
            enough = [step.totals for step in found if step.sequences_per_rank >= 16]
            bars.append(
                at_most(f"parity {parity:g}: imbalance of ranks' totals, 16 sequences a rank", max(enough), 0.03)
            )
    return bars


def packing_table(title: str, keys: tuple[str, ...], found: Seq[PackedStep]) -> Table:
    table = _table(title, *keys, "steps", "+0", "+1", "more", "micro-steps", "fill", "totals %", "waiting %", "ms")

    def key(step: PackedStep) -> tuple[Any, ...]:
        return tuple(getattr(step, name) for name in keys)

    for value, group in itertools.groupby(sorted(found, key=key), key=key):
        steps = list(group)

        def shown(name: str, digits: int, scale: float = 1.0, steps: list[PackedStep] = steps) -> str:
            values = [scale * getattr(step, name) for step in steps]
            return f"{np.median(values):.{digits}f} ({max(values):.{digits}f})"

        above = Counter(min(step.above, 2) for step in steps)
        table.add_row(
            *(str(part) for part in value), str(len(steps)),
            *(f"{above[more] / len(steps):.1%}" for more in range(3)),
            shown("micro_steps", 0), f"{np.median([s.fill for s in steps]):.2f}",
            shown("totals", 2, 100), shown("waiting", 2, 100), shown("seconds", 0, 1e3),
        )  # fmt: skip
    return table


# ---- 3. tokens forwarded


def padded_tokens(lengths: Iterable[int], rows: int) -> int:
    """Of rows in this order, so many at a time, each padded to the longest of its micro-batch."""
    held = list(lengths)
    groups = [held[i : i + rows] for i in range(0, len(held), rows)]
    return sum(len(group) * max(group) for group in groups)


def unit_lengths(store: TokenStore) -> list[list[int]]:
    """Tokens of each unit's sequences."""
    return [[sequence.num_tokens for sequence in store.unit(i)] for i in range(len(store))]


def report_tokens(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    # Not GSM8K: with these two a conversation is about as long as one of UltraChat.
    single = instruction_rows(data) + [_chosen(row) for row in pair_rows(data)]
    single = [row for row in single if row["completion"][0]["content"].strip()]
    conversations = [row for seed in range(5) for row in joined_conversations(single, (2, 7), seed=seed)]
    path = write_rows(folder / "joined.jsonl", conversations)
    # The same responses everywhere: a conversation ends with the last response that fits.
    merged, unfolded = (prepared(path, chat, folder / "cache", merge=merge).selection for merge in (True, False))
    assert merged.num_responses == unfolded.num_responses
    pairs = prepared(write_rows(folder / "pairs.jsonl", pair_rows(data)), chat, folder / "cache").selection
    whole = [sum(unit) for unit in unit_lengths(merged.store)]
    each = [sum(unit) for unit in unit_lengths(unfolded.store)]
    sides = unit_lengths(pairs.store)
    rng = np.random.default_rng(0)

    def padded(units: Seq[Seq[int]]) -> float:
        """The mean over 20 orders."""
        orders = [rng.permutation(len(units)) for _ in range(20)]
        rows = [[length for i in order for length in units[i]] for order in orders]
        return float(np.mean([padded_tokens(lengths, ROWS_PADDED_TOGETHER) for lengths in rows]))

    peer = padded([[length] for length in each])
    _tokens_table(
        console,
        f"{len(whole)} conversations of 2 to 7 answers, {merged.num_responses} responses, at most {MAX_LENGTH} tokens",
        merged.num_responses,
        {
            "one response a row, padded to max_length": float(len(each) * MAX_LENGTH),
            f"one response a row, padded to the longest of {ROWS_PADDED_TOGETHER}": peer,
            f"one conversation a row, padded to the longest of {ROWS_PADDED_TOGETHER}": padded([[n] for n in whole]),
            "packed (merge_conversations: false)": float(sum(each)),
            "packed, conversations merged": float(sum(whole)),
        },
        peer,
    )
    peer_pairs = padded(sides)
    _tokens_table(
        console,
        f"{len(sides)} pairs, {pairs.num_responses} responses, each side of at most {MAX_LENGTH} tokens",
        pairs.num_responses,
        {
            "padded to max_length": float(2 * len(sides) * MAX_LENGTH),
            f"padded to the longest of {ROWS_PADDED_TOGETHER} ({ROWS_PADDED_TOGETHER // 2} pairs)": peer_pairs,
            "packed": float(sum(map(sum, sides))),
        },
        peer_pairs,
    )
    return report_shared_prompts(console, data, chat, folder)


def report_shared_prompts(console: Console, data: Path, chat: ChatTokenizer, folder: Path) -> list[Bar]:
    """Rows that hold a prompt once, beside rows that hold it with each of its answers.

    UltraFeedback's prompts with their pairs; with four answers, two of their own and two of the next prompt; and groups
    of eight answers as online methods make them, whose prompt is as long as they are: real answers of like lengths.
    """
    rows = [row for row in pair_rows(data) if all(row[side][0]["content"].strip() for side in ("chosen", "rejected"))]
    answers = [[row["chosen"][0]["content"], row["rejected"][0]["content"]] for row in rows]
    four = [
        _scored(row["prompt"][0]["content"], answer, number)
        for row, own, others in zip(rows, answers, [*answers[1:], answers[0]], strict=True)
        for number, answer in enumerate([*own, *others])
    ]
    by_length = sorted({answer for own in answers for answer in own}, key=len)
    groups = [by_length[i : i + 9] for i in range(0, len(by_length) - 8, 9)]
    eight = [_scored(prompt, answer, number) for prompt, *own in groups for number, answer in enumerate(own)]
    cases = {
        "pairs": (prepared(write_rows(folder / "pairs.jsonl", rows), chat, folder / "cache"), 0.85),
        "4 answers": (prepared(write_rows(folder / "4.jsonl", four), chat, folder / "cache", format="jsonl"), None),
        "8 answers": (prepared(write_rows(folder / "8.jsonl", eight), chat, folder / "cache", format="jsonl"), 0.6),
    }
    table = _table(
        "prompts in a row once, steps of 64 responses on 2 ranks, 4,096 tokens a micro-batch",
        "", "tokens of a prompt", "of a response", "forwarded a response, packed", "shared", "/ packed",
        "/ least possible", "micro-steps",
    )  # fmt: skip
    bars = []
    for name, (source, bar) in cases.items():
        (alone, steps), (shared, fewer) = (_forwarded(source, share_prompts=share) for share in (False, True))
        prompt, response, least = _lengths(TogetherSource.of(source, 64))
        table.add_row(
            name, f"{prompt:.0f}", f"{response:.0f}", f"{alone:.0f}", f"{shared:.0f}", f"{shared / alone:.2f}",
            f"{shared / least:.3f}", f"{steps} -> {fewer}",
        )  # fmt: skip
        bars.append(at_most(f"{name}: forwarded tokens, shared / least possible", shared / least, 1.1))
        if bar is not None:
            bars.append(at_most(f"{name}: forwarded tokens, shared / packed", shared / alone, bar))
    console.print(table)
    return bars


def _scored(prompt: str, response: str, number: int) -> Row:
    return {"prompt": prompt, "response": response, "score": number / 8}


def _lengths(source: TogetherSource) -> tuple[float, float, float]:
    """Mean tokens of a prompt and of a response; tokens a response if each prompt were forwarded once."""
    units = [source.selection.unit(i) for i in range(len(source.selection))]
    prompts = [sequence.prompt_tokens for unit in units for sequence in unit]
    responses = [sequence.num_tokens - sequence.prompt_tokens for unit in units for sequence in unit]
    least = sum(unit[0].prompt_tokens for unit in units) + sum(responses)
    return float(np.mean(prompts)), float(np.mean(responses)), least / len(responses)


def _forwarded(source: PreparedSource, *, share_prompts: bool) -> tuple[float, int]:
    """Tokens forwarded for a response, and micro-steps, over one epoch."""
    drawn = TogetherSource.of(source, 64) if share_prompts else source
    tokens = micro_steps = 0
    for step in plan_steps([drawn], seed=0, examples_per_step=64, epochs=1, steps=None):
        ranks = pack(step, tokens_per_micro_batch=4096, world_size=2, packing=Packing(6100.0, share_prompts))
        micro_steps += len(ranks[0])
        tokens += sum(
            len(micro_batch(bin_, share_prompts=share_prompts).token_ids_T) for bins in ranks for bin_ in bins if bin_
        )
    return tokens / source.selection.num_responses, micro_steps


def _chosen(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["chosen"]}


def _tokens_table(console: Console, title: str, responses: int, tokens: dict[str, float], peer: float) -> None:
    table = _table(title, "", "tokens a response", "/ padded peer")
    for way, total in tokens.items():
        table.add_row(way, f"{total / responses:.0f}", f"{total / peer:.2f}")
    console.print(table)


# ---- 4. a million rows


@dataclass
class Memory:
    """Peaks of this process and of those it started, sampled; bytes."""

    before: int = 0
    anonymous: int = 0
    workers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By process: VmHWM, and the peak of RssAnon."""

    @property
    def growth(self) -> int:
        return self.anonymous - self.before


def status_bytes(process: int | str, name: str) -> int:
    """A number of /proc/PROCESS/status; 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def started_processes() -> list[int]:
    """The workers that this process has spawned."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # The command may hold spaces and parentheses; the parent is the second field after it.
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            is_worker = parent == os.getpid() and b"spawn_main" in (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if is_worker:
            found.append(int(path.name))
    return found


@contextmanager
def sampling(every: float = 0.05) -> Iterator[Memory]:
    memory = Memory(before=status_bytes("self", "RssAnon"))
    done = threading.Event()

    def sample() -> None:
        number = 0
        processes: list[int] = []
        while not done.is_set():
            memory.anonymous = max(memory.anonymous, status_bytes("self", "RssAnon"))
            processes = started_processes() if number % 20 == 0 else processes
            for process in processes:
                peak, anonymous = status_bytes(process, "VmHWM"), status_bytes(process, "RssAnon")
                before = memory.workers.get(process, (0, 0))
                memory.workers[process] = (max(before[0], peak), max(before[1], anonymous))
            number += 1
            done.wait(every)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield memory
    finally:
        done.set()
        sampler.join()
        memory.anonymous = max(memory.anonymous, status_bytes("self", "RssAnon"))


def write_short_rows(data: Path, path: Path, num_rows: int) -> None:
    """Short instructions, again and again, a number in each prompt; written as they come."""
    short = [
        {"prompt": row["prompt"][0]["content"], "response": row["completion"][0]["content"]}
        for row in instruction_rows(data)
        if len(row["prompt"][0]["content"]) + len(row["completion"][0]["content"]) <= 300
    ]
    with path.open("w", encoding="utf-8") as file:
        for number, row in zip(range(num_rows), itertools.cycle(short), strict=False):
            file.write(json.dumps(row | {"prompt": f"{number}. {row['prompt']}"}) + "\n")


def long_source(data: Path, num_rows: int) -> dict[str, Any]:
    """In this process, in which nothing else has been done: what each stage takes."""
    chat = load_tokenizer(str(tokenizer_folder()))
    result: dict[str, Any] = {"rows": num_rows}
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        path = folder / "rows.jsonl"
        write_short_rows(data, path, num_rows)
        result["source_bytes"] = path.stat().st_size
        source = SourceSettings(str(path), None, rules())
        with sampling() as whole:

            def stage(label: str, run: Callable[[], Any]) -> Any:
                start, before = time.perf_counter(), whole.before
                with sampling() as memory:
                    value = run()
                result[label] = {
                    "seconds": time.perf_counter() - start,
                    "growth": memory.anonymous - before,
                    "workers": [list(peaks) for peaks in memory.workers.values()],
                }
                return value

            def prepare(workers: int) -> PreparedSource:
                return prepare_source(source, chat, cache, seed=0, tolerance=Tolerance(), workers=workers)

            store = stage("prepare", lambda: prepare(2)).selection.store
            result["store_bytes"] = sum(file.stat().st_size for file in store.folder.iterdir())
            result["tokens"] = int(store.tokens_U.sum())
            found = stage("open with a warm cache", lambda: TokenStore(store.folder, "rows"))
            pool = Selection(found, np.arange(len(found)))
            ingredients = [Mixed("rows", pool)]
            steps = stage(
                "plan 3 epochs",
                lambda: plan_steps(ingredients, seed=0, examples_per_step=512, epochs=3, steps=None),
            )
            stage("make the last step", lambda: steps[-1])
            walked = np.random.default_rng(0).integers(len(steps), size=200)
            stage("make 200 random steps", lambda: sum(len(steps[int(i)].sequences) for i in walked))
        result["steps"], result["growth"], result["before"] = len(steps), whole.growth, whole.before
    return result


def long_source_apart(data: Path, num_rows: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--data", str(data), "--one", str(num_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_million(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    small, large = (long_source_apart(data, count) for count in (options.rows // 10, options.rows))
    for result in (small, large):
        megabytes = {name: f"{result[name] / 1e6:.0f} MB" for name in ("source_bytes", "store_bytes", "before")}
        title = (
            f"{result['rows']} rows, {megabytes['source_bytes']}; store {megabytes['store_bytes']}, "
            f"{result['tokens'] / 1e6:.1f} M tokens; {result['steps']} steps of 512; "
            f"parent before: {megabytes['before']}"
        )
        table = _table(title, "", "seconds", "parent RssAnon +MB", "workers VmHWM MB", "workers RssAnon MB")
        for label, found in result.items():
            if isinstance(found, dict):
                # Later stages may still see the workers end.
                workers = found["workers"] if label == "prepare" else []
                peaks = [" ".join(f"{peak[i] / 1e6:.0f}" for peak in workers) for i in (0, 1)]
                table.add_row(label, f"{found['seconds']:.2f}", f"{found['growth'] / 1e6:.0f}", *peaks)
        console.print(table)
    preparing = [result["prepare"]["growth"] / 1e6 for result in (small, large)]
    per_row = (large["growth"] - small["growth"]) / (large["rows"] - small["rows"])
    console.print(f"  growth of the parent with each row, opening and planning included: {per_row:.0f} bytes")
    return [
        at_most(f"{large['rows']} rows: peak RssAnon of the parent over before, MB", large["growth"] / 1e6, 500),
        at_most("preparing: peak at ten times the rows, MB over that of a tenth", preparing[1] - preparing[0], 50),
    ]


# ---- all of it


PARTS = {
    "prepare": report_preparation,
    "packing": report_packing,
    "tokens": report_tokens,
    "million": report_million,
}


def tokenizer_folder() -> Path:
    """Qwen2.5's, or without a package index that of the quickstart's model."""
    try:
        return qwen25_tokenizer()
    except pytest.skip.Exception:
        return default_cache_dir() / NAME


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("UFT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="the folder of real rows (default: UFT_TEST_DATA)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of `million` (default: {ROWS})")
    parser.add_argument("--prepare-rows", type=int, default=10_000, help="of `prepare`, a fourth for pairs")
    parser.add_argument("--rounds", type=int, default=3, help="of `prepare` (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="packed for each setting (default: 20)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    if not options.data.is_dir():
        parser.error(f"no real data at {options.data}; set UFT_TEST_DATA")
    if options.one:
        print(json.dumps(long_source(options.data, options.one)))
        return 0
    warnings.filterwarnings("ignore")  # TRL's configuration warns of its own defaults
    console = Console(width=150, highlight=False)
    folder = tokenizer_folder()
    packages = ("trl", "datasets", "transformers", "tokenizers", "numpy")
    console.print(", ".join(f"{name} {release(name)}" for name in packages) + f"; tokenizer {folder.name}")
    chat, bars = load_tokenizer(str(folder)), []
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            bars += PARTS[part](console, options.data, chat, Path(name), options)
    for bar in bars:
        console.print(f"  {'OK    ' if bar.holds else 'MISSED'}  {bar.claim}: {bar.value:.4g}")
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
