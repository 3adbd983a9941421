"""What both sides of `against_trl.py` train on: random rows for a tiny model, real ones for SmolLM2-135M.

Not a benchmark itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.mixture import Step

RANKS = 2


@dataclass(frozen=True)
class Workload:
    """What both sides train on: rows of token ids, and how many of them a step and a rank take.

    loss: ours. Rows of `l1` have the keys prompt_ids, completion_ids and label, rows of `dpo` prompt_ids, chosen_ids
        and rejected_ids, as TRL's collators take them.
    """

    label: str
    loss: Literal["l1", "dpo"]
    folder: Path
    rows: list[dict[str, Any]]
    rows_per_rank: int
    steps: int
    learning_rate: float
    """High enough that the losses compared are not those of a model that stands still."""
    zero: dict[str, int]
    rounds: int
    """How often each side runs, in turn; the fastest counts."""
    ranks: int = RANKS
    dtype: torch.dtype = torch.float32
    deepspeed: str = "zero3_cpu"


def sequences(row: dict[str, Any], number: int) -> list[Sequence]:
    """A row of either layout; the sides of a pair share the row's number."""
    if "label" in row:
        return [_sequence(row["prompt_ids"], row["completion_ids"], float(row["label"]), f"row:{number}", None)]
    return [
        _sequence(row["prompt_ids"], row[f"{side}_ids"], score, f"row:{number}:{side}", number)
        for side, score in (("chosen", 1.0), ("rejected", 0.0))
    ]


def _sequence(prompt: list[int], answer: list[int], score: float, origin: str, pair_id: int | None) -> Sequence:
    tokens = np.array(prompt + answer, dtype=np.int32)
    kind: Kind = "binary" if pair_id is None else "pair"
    return Sequence(tokens, (Response(len(prompt), len(tokens), score, kind, origin, pair_id),))


def random_rows(count: int, vocabulary: int, longest: int = 100) -> list[dict[str, Any]]:
    """Random tokens with the spread of lengths that real rows have: median 60, a few of 200, if prompts and completions
    are not longer than 100; all in proportion to that."""
    rng = np.random.default_rng(0)

    def row() -> dict[str, Any]:
        lengths = np.clip(rng.lognormal(3.4, 0.6, size=2), 8, 100) * longest / 100
        prompt, completion = (int(n) for n in lengths)
        tokens = rng.integers(3, vocabulary, size=prompt + completion).tolist()
        return {"prompt_ids": tokens[:prompt], "completion_ids": tokens[prompt:], "label": bool(rng.integers(2))}

    return [row() for _ in range(count)]


def tiny_workload(folder: Path, zero: dict[str, int], vocabulary: int) -> Workload:
    """The communication alone."""
    steps, rows_per_rank = 12, 8
    rows = random_rows(RANKS * rows_per_rank * steps, vocabulary)
    label = "KTO, tiny, 4 layers of 256 (communication alone)"
    return Workload(label, "l1", folder, rows, rows_per_rank, steps, 1e-2, zero, 3)


REAL_ZERO = {"stage3_max_live_parameters": 20_000_000, "stage3_prefetch_bucket_size": 4_000_000}
"""Layers of 135M are gathered and released, not kept: as a model that does not fit has to."""

LONGEST = 512
"""Tokens of a row's longest sequence."""


class Chat:
    """Token ids through the model's own chat template."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str) -> list[int]:
        return list(self._tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])


def kto_workload(folder: Path, data: Path) -> Workload:
    """Binary feedback on real prompts."""
    chat, rows = Chat(folder), []
    for row in json.loads((data / "llama_factory" / "kto_en_demo.json").read_text(encoding="utf-8")):
        *prompt, answer = row["messages"]
        ids = {"prompt_ids": chat.prompt(prompt), "completion_ids": chat.answer(answer["content"])}
        if sum(map(len, ids.values())) <= LONGEST:
            rows.append(ids | {"label": row["label"]})
    return Workload("KTO, SmolLM2-135M, KTO-mix (arithmetic)", "l1", folder, rows, 2, 6, 1e-3, REAL_ZERO, 1)


def dpo_workload(folder: Path, data: Path) -> Workload:
    """Pairs of answers to one real prompt."""
    chat, rows = Chat(folder), []
    for line in (data / "ultrafeedback" / "train_clean.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        row = json.loads(line)
        prompt = chat.prompt([{"role": "user", "content": row["prompt"]}])
        answers = {f"{side}_ids": chat.answer(row[side]) for side in ("chosen", "rejected")}
        if row["chosen"] and row["rejected"] and len(prompt) + max(map(len, answers.values())) <= LONGEST:
            rows.append({"prompt_ids": prompt} | answers)
    return Workload("DPO, SmolLM2-135M, UltraFeedback (arithmetic)", "dpo", folder, rows, 2, 6, 1e-3, REAL_ZERO, 1)


def lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of a row's sequences, the prompt with each answer."""
    return [sequence.num_tokens for sequence in sequences(row, 0)]


def rows_of(work: Workload, step: int) -> list[dict[str, Any]]:
    """What all ranks together train on in a step."""
    rows_per_step = work.ranks * work.rows_per_rank
    return work.rows[step * rows_per_step : (step + 1) * rows_per_step]


def steps_of(work: Workload) -> list[Step]:
    """The steps as our side takes them."""
    return [
        Step(
            index,
            tuple(sequence for number, row in enumerate(rows_of(work, index)) for sequence in sequences(row, number)),
        )
        for index in range(work.steps)
    ]


def real_tokens(work: Workload, step: int) -> int:
    return sum(sum(lengths(row)) for row in rows_of(work, step))


def padded_tokens(work: Workload, step: int) -> int:
    """TRL's batches: every row of a rank as long as the longest of them."""
    total = 0
    for rank in range(work.ranks):
        # accelerate deals whole batches out to the ranks in turn
        start = (step * work.ranks + rank) * work.rows_per_rank
        rows = work.rows[start : start + work.rows_per_rank]
        padded = [length for row in rows for length in lengths(row)]
        total += max(padded) * len(padded)
    return total


def real_model() -> Path | None:
    from uft_ds.examples.smollm2 import NAME, default_cache_dir, is_complete

    folder = default_cache_dir() / NAME
    return folder if is_complete(folder) else None
