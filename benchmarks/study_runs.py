"""The runs of the study: where they lie, how each is trained, and what is known of them.

Not a benchmark itself: a part of benchmarks/study.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_runs import Results, train
from study_data import source
from study_methods import METHODS

BETA = 0.1
RESPONSES_A_STEP = 20
STEPS, FIRST_STAGE = 20, 10
ASKED = {1: ("ifeval", "truthfulqa_mc2")}
"""The benchmarks that a seed is asked. They take longer than the training."""
MAX_NEW_TOKENS = 32
QUESTIONS, QUESTION_TOKENS = 24, 128
"""Of each benchmark, and the most new tokens of an answer to it: enough to compare runs, not to compare with others."""


@dataclass(frozen=True)
class Study:
    """Where a study lies, and what is known of its runs.

    ends: on the monotonic clock; no run is begun after it. methods: those that are run and shown.
    """

    folder: Path
    base: Path
    questions: Path | None
    results: Results
    ends: float
    methods: tuple[str, ...]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def asked(self, seed: int) -> tuple[str, ...]:
        """The benchmarks that a run with this seed is asked, if there is data for them."""
        return () if self.questions is None else ASKED.get(seed, ())

    def num_questions(self, seed: int) -> int:
        """Questions of each of them: a run that was measured without any is measured again with them."""
        return QUESTIONS if self.asked(seed) else 0

    def may_begin(self) -> bool:
        return time.monotonic() < self.ends

    def first_stage(self, seed: int, rate: float) -> Path:
        """The adapter of the shared first stage, trained if need be."""
        run = self.folder / "runs" / f"first-{rate:g}-{seed}"
        overrides = {"data.sources": [source(self.data, "instruction", 1.0)], "objective.loss": "nll"}
        train("quickstart", run, self.common(seed, rate, FIRST_STAGE) | overrides)
        return run

    def own_answers(self, seed: int, first_rate: float) -> Path:
        """What the first stage's policy answers to the prompts that the online methods ask; it is not moved."""
        run = self.folder / "runs" / f"frozen-{first_rate:g}-{seed}"
        overrides = self.common(seed, 1e-12, STEPS - FIRST_STAGE) | {
            "data.sources": [source(self.data, "prompts", 1.0)],
            "objective.loss": "mse",
            "reference.adapter": str(self.first_stage(seed, first_rate)),
            "generator.max_new_tokens": MAX_NEW_TOKENS,
        }
        train("quickstart_online", run, overrides)
        return run / "rollouts" / "answers"

    def common(self, seed: int, rate: float, steps: int) -> dict[str, Any]:
        return {
            "model.base": str(self.base),
            "data.held_out": [{"format": "jsonl", "path": str(self.data / "watched.jsonl")}],
            "train.examples_per_step": RESPONSES_A_STEP,
            "train.evaluate_every": 1000,
            "train.checkpoint_every": 1000,
            "train.steps": steps,
            "train.lr": rate,
            "train.seed": seed,
            "deepspeed": "zero2",  # the model fits a rank: a step takes two thirds of the time
            "train.schedule": "linear",
        }

    def trained(self, name: str, rate: float, seed: int, first_rate: float, mix: Mapping[str, float] | None) -> Path:
        """The folder of a run, trained if need be."""
        method = METHODS[name]
        sources = method.sources if mix is None else mix
        shares = "" if mix is None else "-" + "-".join(f"{share:.3f}" for share in mix.values())
        run = self.folder / "runs" / f"{name}-{rate:g}-{seed}{shares}"
        overrides = self.common(seed, rate, STEPS - FIRST_STAGE if method.after_sft else STEPS) | {
            "data.sources": [source(self.data, part, share) for part, share in sources.items()],
            "objective.loss": method.loss,
            "objective.beta": BETA,
        }
        if method.own_answers:
            answers = str(self.own_answers(seed, first_rate))
            overrides["data.sources"] = [{"format": "recorded", "path": answers}]
        if method.online:
            overrides["generator.max_new_tokens"] = MAX_NEW_TOKENS
        if method.after_sft:
            overrides["reference.adapter"] = str(self.first_stage(seed, first_rate))
        recipe = "quickstart_online" if method.online else "quickstart"
        train(recipe, run, overrides | dict(method.more))
        return run
