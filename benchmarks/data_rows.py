"""The real rows and the real tokenizer that the data benchmark is measured on, and how they are prepared.

Rows are in TRL's layouts, which both sides read. Not a benchmark itself.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_tokenizers import qwen25_tokenizer
from sources import rules

from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.examples.smollm2 import NAME, default_cache_dir

MAX_LENGTH = 2048

Row = dict[str, Any]


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


def tokenizer_folder() -> Path:
    """Qwen2.5's, or without a package index that of the quickstart's model."""
    try:
        return qwen25_tokenizer()
    except pytest.skip.Exception:
        return default_cache_dir() / NAME
