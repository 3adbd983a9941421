"""What the study measures of a run: grades of answers, the order of scores, what online steps spent, benchmarks.

Not a benchmark itself: a part of benchmarks/study.py.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart_runs import answers_of, policy_of, uft
from study_runs import BETA, MAX_NEW_TOKENS, QUESTION_TOKENS, QUESTIONS, Study


def graded(model: Any, tokenizer: Any, path: Path) -> dict[str, float]:
    """What a model answers to the tasks of a file."""
    from uft_ds.examples.verifiable import grade, is_correct, read_tasks

    tasks = read_tasks(path)
    answers = answers_of(model, tokenizer, tasks, MAX_NEW_TOKENS)
    return {
        "exactly right": statistics.fmean(map(is_correct, tasks, answers)),
        "mean grade": statistics.fmean(map(grade, tasks, answers)),
        "answer tokens": statistics.fmean(len(tokenizer.encode(answer)) for answer in answers),
    }


def ordering(policy: Any, tokenizer_of: Path, data: Path) -> dict[str, float]:
    """How well the implicit score, sigma(beta log-ratio) against the base, agrees with the scores of test answers."""
    from log_probs import hugging_face_logps

    from uft_ds.data.sources import SourceSettings, Tolerance, prepare_source
    from uft_ds.data.store.building import RowRules
    from uft_ds.data.tokens.tokenize import load_tokenizer
    from uft_ds.record.telemetry import calibration_error, rank_correlation

    rules = RowRules("jsonl", None, max_length=256, merge=True, trim_prompt=False)
    settings = SourceSettings(str(data / "test_both.jsonl"), None, rules)
    tokenizer = load_tokenizer(str(tokenizer_of))
    prepared = prepare_source(settings, tokenizer, data.parent / "tokens", seed=0, tolerance=Tolerance())
    selection = prepared.selection
    sequences = tuple(sequence for index in range(len(selection)) for sequence in selection.unit(index))
    # The base's half is the same for every run: measured once for these tokens.
    kept = data / f"base_logps-{prepared.key}.npy"
    with torch.no_grad():
        if not kept.exists():
            np.save(kept, hugging_face_logps(policy, sequences, adapters=False).numpy())
        ratios = hugging_face_logps(policy, sequences).numpy() - np.load(kept)
    implicit = 1 / (1 + np.exp(-BETA * ratios))
    given = np.array([response.score for sequence in sequences for response in sequence.responses])
    return {
        "rank correlation": float(np.nan_to_num(rank_correlation(implicit, given))),
        "calibration error": calibration_error(implicit, given),
    }


def spent(run: Path) -> dict[str, float]:
    """Of an online run: the mean log-ratio of the last three steps' answers, and mean seconds of a step by phase."""
    from uft_ds.record.metrics_file import read_metrics

    lines = [line for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line]
    if "rollouts/generation_seconds" not in lines[-1]:
        return {}

    def mean(name: str, of: list[dict[str, Any]]) -> float:
        return statistics.fmean(line.get(name) or 0.0 for line in of)

    return {
        "log-ratio": mean("log_ratio/score", lines[-3:]),
        "generate, s": mean("rollouts/generation_seconds", lines),
        "score, s": mean("rollouts/scoring_seconds", lines),
        "train, s": mean("seconds", lines),
    }


def asked_questions(study: Study, run: Path | None, asked: tuple[str, ...]) -> dict[str, float]:
    """IFEval, the mean of its four shares, and TruthfulQA mc2 of a run, or of the base; those that are asked."""
    if not asked:
        return {}
    from uft_ds.evaluation.results import read_evaluation

    out = study.folder / "evaluations" / ("base" if run is None else run.name)
    suite = ",".join(f"{task}=0" for task in asked)
    uft(
        *("eval", str(run or study.base), "--suite", suite, "--data", str(study.questions), "--limit", str(QUESTIONS)),
        *("--max-new-tokens", str(QUESTION_TOKENS), "--chat-template", "--out", str(out)),
    )
    shown = {"ifeval": ("prompt", "inst"), "truthfulqa_mc2": ("acc",)}
    return {
        task.task.removesuffix("_mc2"): statistics.fmean(
            value for name, value in task.metrics.items() if name.startswith(shown[task.task])
        )
        for task in read_evaluation(out).tasks
    }


def measured(study: Study, run: Path | None, asked: tuple[str, ...] = ()) -> dict[str, float]:
    """All that the tables show of a run, or of the base before any training (None)."""
    policy, tokenizer = policy_of(run, study.base)
    found = {} if run is None else ordering(policy, study.base, study.data) | spent(run)
    model = policy if run is None else policy.merge_and_unload()
    found |= graded(model, tokenizer, study.data / "test.jsonl")
    untrained = graded(model, tokenizer, study.data / "untrained.jsonl")
    found |= {f"untrained: {name}": value for name, value in untrained.items() if name != "answer tokens"}
    return found | asked_questions(study, run, asked)
