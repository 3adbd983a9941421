"""How fast the builtin generator answers, against Hugging Face's `generate`, on a real model and real prompts.

    python benchmarks/generation.py [--rounds 5] [--new-tokens 64] [--prompts 12] [--only greedy drawn shared step]

SmolLM2-135M with adapters on all linear layers, float32, one thread; prompts of UltraFeedback (UFT_TEST_DATA) by the
model's chat template, the first ones of 60 to 400 tokens. Both generate from the same model object in one process and
take turns; the bars are on medians of the rounds' ratios. Ratios of CPU seconds stand beside them: what else the
machine does hardly changes those.

    greedy         each prompt once, up to its own end: the same tokens from both, which is checked
    drawn          each prompt once, temperature 1, to the full length, because both draw other tokens: `generate` by
                   its own sampling
    shared         8 answers to one prompt, temperature 1, to the full length; prompts of about the answer's length,
                   twice and four times as long: `generate` with num_return_sequences=8, which reads the prompt 8 times
    step           the same with 8 of the real prompts at once, as a step of an online run asks them

Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import Bar, report
from one_process import OneProcess
from real_rows import real_rows_folder
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.evaluation.generate import configured, continuations, generation_config, prompt_ids, stop_token_ids
from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.rollouts.answers import Question, Sampling
from uft_ds.rollouts.builtin import BuiltinGenerator
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.model import UFTModel
from uft_ds.streams.packed_attention import PACKED, attention_of_transformers

CASES = ("greedy", "drawn", "shared", "step")
SHARED_ANSWERS, PROMPTS_OF_A_STEP = 8, 8
SHORTEST, LONGEST = 60, 400
"""Tokens of a prompt."""
AT_LEAST, SHARED_AT_LEAST = 1.0, 1.5


def policy() -> UFTModel:
    base: Any = AutoModelForCausalLM.from_pretrained(
        quickstart_model(), attn_implementation=PACKED, dtype=torch.float32
    )
    base.requires_grad_(False)
    adapted = add_adapters(base, rank=16, alpha=32.0, targets="all-linear", dtype=torch.float32, seed=1)
    return UFTModel(adapted)


def real_prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """Prompts of UltraFeedback by the chat template, in the order of the file."""
    file = real_rows_folder() / "ultrafeedback" / "train_clean.jsonl"
    if not file.is_file():
        sys.exit(f"no real data at {file}; set UFT_TEST_DATA")
    texts = dict.fromkeys(json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()[:400])
    rows = (prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts)
    return [tuple(ids) for ids in rows if SHORTEST <= len(ids) <= LONGEST]


class Bench:
    """One model, and both ways to answer with it. Each returns the ids of each answer, with its stop token."""

    def __init__(self, new_tokens: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(quickstart_model())
        self.engine: Any = OneProcess(policy())
        self.base: Any = self.engine.module.policy.get_base_model()
        self.stop_ids = stop_token_ids(self.base, self.tokenizer)
        self.new_tokens = new_tokens

    def ours(self, questions: list[Question], temperature: float, stop_ids: list[int]) -> list[list[int]]:
        sampling = Sampling(temperature or 1e-9, 1.0, self.new_tokens, tuple(stop_ids))
        generator = BuiltinGenerator(self.engine, sampling, pad_id=self.stop_ids[0], tokens_per_batch=1_000_000)
        generator._continues_caches = True  # a run measures it once, before its first step
        found: list[Any] = list(generator.answer(questions))  # none is left unanswered
        return [list(answer.token_ids) for answers in found for answer in answers]

    def theirs(self, questions: list[Question], temperature: float, stop_ids: list[int]) -> list[list[int]]:
        config = generation_config(stop_ids, self.stop_ids[0], max_new_tokens=self.new_tokens, temperature=temperature)
        config.num_return_sequences = questions[0].answers  # rows of `theirs` are then in the order of `ours`
        rows = [list(question.token_ids) for question in questions]
        with self.engine.evaluating(), attention_of_transformers(self.base), configured(self.base, config):
            found = continuations(self.base, rows, self.stop_ids[0])
        ends = (
            next((place + 1 for place, token in enumerate(ids) if token in stop_ids), self.new_tokens) for ids in found
        )
        return [ids[:end] for ids, end in zip(found, ends, strict=True)]


@dataclass(frozen=True)
class Rate:
    """Tokens of answers for each second of the clock, and for each second of CPU time."""

    of_clock: float
    of_cpu: float


def measured(run: Callable[[], list[list[int]]]) -> tuple[Rate, list[list[int]]]:
    """How fast, and the answers."""
    clock, cpu = time.perf_counter(), time.process_time()
    answers = run()
    tokens = sum(map(len, answers))
    return Rate(tokens / (time.perf_counter() - clock), tokens / (time.process_time() - cpu)), answers


def compare(
    console: Console, name: str, bench: Bench, questions: list[Question], rounds: int, *, greedy: bool
) -> float:
    """The median of the rounds' ratios of tokens a second."""
    temperature, stop_ids = (0.0, bench.stop_ids) if greedy else (1.0, [])
    rates: dict[str, list[Rate]] = {"builtin": [], "generate": []}
    for number in range(rounds):
        order = [("builtin", bench.ours), ("generate", bench.theirs)]
        answers: dict[str, list[list[int]]] = {}
        for who, way in order if number % 2 else reversed(order):
            rate, answers[who] = measured(lambda way=way: way(questions, temperature, stop_ids))  # type: ignore[misc]
            rates[who].append(rate)
        if greedy and answers["builtin"] != answers["generate"]:
            differ = sum(a != b for a, b in zip(*answers.values(), strict=True))
            console.print(f"  {name}: {differ} of {len(questions)} greedy answers differ")
    pairs = list(zip(rates["builtin"], rates["generate"], strict=True))
    of_clock = [ours.of_clock / theirs.of_clock for ours, theirs in pairs]
    of_cpu = [ours.of_cpu / theirs.of_cpu for ours, theirs in pairs]
    lengths = sorted(len(ids) for ids in answers["builtin"])
    prompts = sorted(len(question.token_ids) for question in questions)
    ours, theirs = (statistics.median(rate.of_clock for rate in of) for of in rates.values())
    console.print(
        f"{name}: {len(lengths)} answers of {lengths[0]} to {lengths[-1]} tokens (mean {statistics.mean(lengths):.0f}) "
        f"to {len(prompts)} prompts of {prompts[0]} to {prompts[-1]} (mean {statistics.mean(prompts):.0f})\n"
        f"    builtin {ours:.1f} tokens/s, generate {theirs:.1f}; ratios {listed(of_clock)}; by CPU time "
        f"{statistics.median(of_cpu):.2f} ({listed(of_cpu)})"
    )
    return statistics.median(of_clock)


def listed(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160, highlight=False)
    bench = Bench(options.new_tokens)
    prompts = real_prompts(bench.tokenizer)
    for way in (bench.ours, bench.theirs):  # what is done once in a process is not measured
        way([Question(prompts[0], 2, 1)], 1.0, bench.stop_ids)
    once = [Question(ids, 1, seed) for seed, ids in enumerate(prompts[: options.prompts])]
    bars = []

    def bar(name: str, questions: list[Question], bound: float, *, greedy: bool = False) -> None:
        value = compare(console, name, bench, questions, options.rounds, greedy=greedy)
        bars.append(Bar(f"{name}: tokens/s of the builtin generator / generate >= {bound:g}", value, value >= bound))

    if "greedy" in options.only:
        bar("greedy", once, AT_LEAST, greedy=True)
    if "drawn" in options.only:
        bar("drawn", once, AT_LEAST)
    for wanted in (times * options.new_tokens for times in (1, 2, 4) if "shared" in options.only):
        ids = min(prompts, key=lambda prompt: abs(len(prompt) - wanted))
        name = f"{SHARED_ANSWERS} answers, prompt {len(ids) / options.new_tokens:.1f} x the answer"
        bar(name, [Question(ids, SHARED_ANSWERS, 1)], SHARED_AT_LEAST)
    if "step" in options.only:
        questions = [Question(ids, SHARED_ANSWERS, seed) for seed, ids in enumerate(prompts[:PROMPTS_OF_A_STEP])]
        bar(f"{SHARED_ANSWERS} answers to each of {len(questions)} prompts", questions, SHARED_AT_LEAST)
    return 1 if report(console, bars) else 0


if __name__ == "__main__":
    sys.exit(main())
