"""Tokens forwarded for a response, beside rows that are padded as peers pad them, and with prompts shared.

Not a benchmark itself: a part of benchmarks/data.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from bars import Bar, at_most, table_of
from data_rows import MAX_LENGTH, Row, instruction_rows, joined_conversations, pair_rows, prepared
from rich.console import Console
from sources import write_rows

from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import plan_steps
from uft_ds.data.packing import Packing, pack
from uft_ds.data.sources import PreparedSource
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.together import TogetherSource
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer

ROWS_PADDED_TOGETHER = 8


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
    by_length = sorted({answer for own in answers for answer in own}, key=lambda answer: (len(answer), answer))
    groups = [by_length[i : i + 9] for i in range(0, len(by_length) - 8, 9)]
    eight = [_scored(prompt, answer, number) for prompt, *own in groups for number, answer in enumerate(own)]
    cases = {
        "pairs": (prepared(write_rows(folder / "pairs.jsonl", rows), chat, folder / "cache"), 0.85),
        "4 answers": (prepared(write_rows(folder / "4.jsonl", four), chat, folder / "cache", format="jsonl"), None),
        "8 answers": (prepared(write_rows(folder / "8.jsonl", eight), chat, folder / "cache", format="jsonl"), 0.6),
    }
    table = table_of(
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
    table = table_of(title, "", "tokens a response", "/ padded peer")
    for way, total in tokens.items():
        table.add_row(way, f"{total / responses:.0f}", f"{total / peer:.2f}")
    console.print(table)
