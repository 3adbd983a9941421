"""Does one stage beat two, and do online steps learn? On tasks that code can check, at equal numbers of responses.

    python benchmarks/study.py [--part rates,seeds,mix] [--methods sft,uft] [--minutes 60] [--data DATA]
        [--folder runs/study]

The quickstart's model. Every method sees 400 responses: 20 steps of 20; those of two stages spend 10 steps on the first
stage, SFT, which they share and which is their reference. Three of the eleven kinds of task are never trained. Of the
second stages four go on from the policy's own answers: RLOO, UFT with both sides centred by prompt and without, and UFT
offline on as many answers of the start itself.

rates: each method's last stage with each of three learning rates, a second stage with a fourth, lower one, on a seed of
    its own, and with further ones while the best is the lowest or the highest. The best mean grade on prompts that
    nothing else uses chooses the method's rate. The first stage has the rate of SFT.
seeds: each method at its rate with five seeds. Prompts of the trained kinds and of the other three: answered exactly
    right, mean grade, tokens of an answer. How well the implicit reward against the base orders right and flawed
    answers (rank correlation, calibration error). With --data, IFEval and TruthfulQA mc2 by `uft eval`, the first 24
    questions of each: the first seed both, the next two IFEval (TruthfulQA takes longer than the training). Of online
    methods the mean log-ratio at the end, which is the KL that was spent, and seconds of a step by phase.
mix: UFT with five ratios of right answers to scored ones, those of the paper's ablation, three seeds each.

A run that has a line in `results/study.jsonl` is not run again. With --methods no other method is run (those of two
stages need `sft` first), so that two machines can share the work; their lines are put into one file. With --minutes no
run is begun after so many; the table shows what there is. Two to six minutes a run on two cores; some 50 + 56 + 15
runs. `--picture FILE` draws the mix.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quickstart_runs import Results, answers_of, interval, policy_of, train, uft

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

BETA = 0.1
RESPONSES_A_STEP = 20
STEPS, FIRST_STAGE = 20, 10
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES, SECOND_STAGE = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3, 3e-3)
"""Those that every method is measured with. A second stage may leave its start as it is, which a low rate shows."""
RATE_SEED, SEEDS, MIX_SEEDS = 100, (1, 2, 3, 4, 5), (1, 2, 3)
ASKED = {1: ("ifeval", "truthfulqa_mc2"), 2: ("ifeval",), 3: ("ifeval",)}
"""The benchmarks that a seed is asked. Seven minutes a run for both, of which TruthfulQA's choices take five."""
UNTRAINED_KINDS = ("initials", "bold", "pipes")
TEST, VALIDATION = 15, 10
"""Held-out prompts of each kind."""
WATCHED_EACH = 10
"""Of so many validation prompts the runs themselves look at one, which nothing depends on."""
MAX_NEW_TOKENS = 32
QUESTIONS, QUESTION_TOKENS = 24, 128
"""Of each benchmark, and the most new tokens of an answer to it: enough to compare runs, not to compare with others."""
SCORED_PARTS = (16, 32, 65, 130, 260)
"""Scored rows for 20 instruction rows, in thousands (arXiv 2410.21438, the ablation of the data's mix)."""


@dataclass(frozen=True)
class Method:
    """How a method's last stage is trained.

    sources: names of files of data, each with its share. after_sft: whether it goes on from the shared first stage,
    which is then its reference. online: whether the policy answers itself. own_answers: whether it learns from answers
    that the first stage's policy has given.
    """

    label: str
    sources: Mapping[str, float]
    loss: Any
    after_sft: bool = False
    online: bool = False
    own_answers: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method("SFT", {"instruction": 1.0}, "nll"),
    "sft_dpo": Method("SFT -> DPO", {"pairs": 1.0}, {"pair": "dpo", "instruction": "nll"}, after_sft=True),
    "sft_kto": Method("SFT -> KTO", {"split": 1.0}, "l1", after_sft=True, more={"objective.reward_shift": "kl"}),
    "sft_una": Method("SFT -> UNA", {"scored": 1.0}, "mse", after_sft=True),
    "sft_rloo": Method(
        "SFT -> RLOO",
        {"prompts": 1.0},
        {"score": "rloo", "instruction": "nll"},
        after_sft=True,
        online=True,
        more={"objective.beta": {"score": 0.01}, "objective.center": "none"},
    ),
    "sft_uft_online": Method(
        "SFT -> UFT online, centred",
        {"prompts": 1.0},
        "mse",
        after_sft=True,
        online=True,
        more={"objective.center": "prompt"},
    ),
    "sft_uft_plain": Method(
        "SFT -> UFT online, plain",
        {"prompts": 1.0},
        "mse",
        after_sft=True,
        online=True,
        more={"objective.center": "none"},
    ),
    "sft_uft_own": Method(
        "SFT -> UFT on its own answers",
        {},
        "mse",
        after_sft=True,
        own_answers=True,
        more={"objective.center": "prompt"},
    ),
    "una": Method("UNA", {"scored": 1.0}, "mse"),
    "uft": Method("UFT", {"instruction": 0.4, "scored": 0.6}, "mse"),
    "uft_online": Method(
        "UFT online", {"instruction": 0.4, "prompts": 0.6}, "mse", online=True, more={"objective.center": "prompt"}
    ),
}


# --- data ---


def write_data(folder: Path) -> None:
    """The same prompts four ways, and held-out ones by their use."""
    from uft_ds.examples.verifiable import TASK_KINDS, Row, flawed_response, generate, grade

    made = generate(1650, (TEST + VALIDATION) * len(TASK_KINDS), 0)
    rng = random.Random("study")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, lines: Iterable[str]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    trained = [row for row in made.scored_rows if row.task.kind not in UNTRAINED_KINDS]
    write("instruction", (Row(row.task, row.task.answer).to_json() for row in trained))
    write("scored", (row.to_json() for row in trained))
    flawed = [row for row in trained if row.score is not None and row.score < 1.0]
    write(
        "pairs",
        (
            json.dumps({"prompt": row.task.prompt, "chosen": row.task.answer, "rejected": row.response})
            for row in flawed
        ),
    )
    by_kind: dict[str, list[Any]] = {}
    for task in made.held_out_tasks:
        by_kind.setdefault(task.kind, []).append(task)
    for name, start, stop, kinds in (
        ("test", 0, TEST, set(TASK_KINDS) - set(UNTRAINED_KINDS)),
        ("untrained", 0, TEST, set(UNTRAINED_KINDS)),
        ("validation", TEST, TEST + VALIDATION, set(TASK_KINDS) - set(UNTRAINED_KINDS)),
    ):
        tasks = [task for kind in TASK_KINDS if kind in kinds for task in by_kind[kind][start:stop]]
        write(name, (Row(task, task.answer).to_json() for task in tasks))
        if name == "validation":
            write("watched", (Row(task, task.answer).to_json() for task in tasks[::WATCHED_EACH]))
        if name == "test":
            both = [(task, text) for task in tasks for text in (task.answer, flawed_response(task, rng))]
            write("test_both", (Row(task, text, grade(task, text)).to_json() for task, text in both))


def source(data: Path, name: str, share: float) -> dict[str, Any]:
    """A source of a recipe that reads one of the files."""
    given: dict[str, Any] = {"format": "jsonl", "path": str(data / f"{name}.jsonl")}
    if name == "split":
        given |= {"path": str(data / "pairs.jsonl"), "pairs": "split"}
    if name == "prompts":
        given |= {
            "format": "prompts",
            "path": str(data / "scored.jsonl"),
            "columns": {"response": None, "score": None},
            "answers": 4,
            "score_by": "code:uft_ds.examples.verifiable_scores:score",
        }
    return given if share == 1.0 else given | {"share": share}


# --- runs ---


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
    selection = prepare_source(settings, tokenizer, data.parent / "tokens", seed=0, tolerance=Tolerance()).selection
    sequences = tuple(sequence for index in range(len(selection)) for sequence in selection.unit(index))
    ratios = hugging_face_logps(policy, sequences) - hugging_face_logps(policy, sequences, adapters=False)
    implicit = 1 / (1 + np.exp(-BETA * ratios.numpy()))
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


# --- parts ---


def measure_rates(study: Study) -> dict[str, float]:
    """Each method's rate, of the methods for which enough rates are measured; SFT's comes first."""
    chosen: dict[str, float] = {}
    for name in study.methods:
        grades: dict[float, float] = {}
        needed = SECOND_STAGE if METHODS[name].after_sft else FIRST_RATES
        while (rate := _next_rate(grades, needed)) is not None:
            if METHODS[name].after_sft and "sft" not in chosen:
                break
            line = {"part": "rates", "method": name, "rate": rate, "first_rate": _first_rate(name, chosen)}
            found = study.results.of(line)
            if found is None and study.may_begin():
                run = study.trained(name, rate, RATE_SEED, chosen.get("sft", 0.0), None)
                policy, tokenizer = policy_of(run, study.base)
                found = graded(policy.merge_and_unload(), tokenizer, study.data / "validation.jsonl")
                study.results.add(line, found)
            if found is None:
                break
            grades[rate] = found["mean grade"]
        else:
            chosen[name] = max(grades, key=grades.__getitem__)
            shown = ", ".join(f"{rate:g}: {grades[rate]:.3f}" for rate in sorted(grades))
            print(f"{METHODS[name].label}: {chosen[name]:g} (mean grades {shown})", flush=True)
    return chosen


def _next_rate(grades: Mapping[float, float], needed: Iterable[float]) -> float | None:
    """The rate that is measured next; None: the best one lies between two others, or at an end of `RATES`."""
    left = [rate for rate in needed if rate not in grades]
    if left:
        return left[0]
    best, tried = max(grades, key=grades.__getitem__), sorted(grades)
    step = {tried[-1]: 1, tried[0]: -1}.get(best)
    place = RATES.index(best) + (step or 0)
    return RATES[place] if step is not None and 0 <= place < len(RATES) else None


def _first_rate(name: str, chosen: Mapping[str, float]) -> float | None:
    return chosen["sft"] if METHODS[name].after_sft else None


def measure_seeds(study: Study, chosen: Mapping[str, float]) -> None:
    """Every method with every seed, a seed after the other; the table of what there is."""
    base_line = {"part": "seeds", "method": "base", "questions": study.num_questions(SEEDS[0])}
    base = study.results.of(base_line)
    if base is None and study.may_begin():
        base = measured(study, None, study.asked(SEEDS[0]))
        study.results.add(base_line, base)
    rows: dict[str, list[dict[str, float]]] = {"before training": [base] if base else []}
    for seed in SEEDS:
        for name, rate in chosen.items():
            first_rate = _first_rate(name, chosen)
            line = {"part": "seeds", "method": name, "rate": rate, "first_rate": first_rate, "seed": seed}
            line["questions"] = study.num_questions(seed)
            found = study.results.of(line)
            if found is None and study.may_begin():
                run = study.trained(name, rate, seed, first_rate or 0.0, None)
                found = measured(study, run, study.asked(seed))
                study.results.add(line, found)
            if found is not None:
                rows.setdefault(METHODS[name].label, []).append(found)
    show(rows)


def measure_mix(study: Study, rate: float) -> dict[int, list[dict[str, float]]]:
    """UFT with each ratio of scored to right answers, by the scored part; the table of what there is."""
    found_of: dict[int, list[dict[str, float]]] = {part: [] for part in SCORED_PARTS}
    for seed in MIX_SEEDS:
        for part in SCORED_PARTS:
            line = {"part": "mix", "method": "uft", "rate": rate, "scored": part, "seed": seed}
            found = study.results.of(line)
            if found is None and study.may_begin():
                mix = {"instruction": round(20 / (20 + part), 3), "scored": round(part / (20 + part), 3)}
                found = measured(study, study.trained("uft", rate, seed, 0.0, mix))
                study.results.add(line, found)
            if found is not None:
                found_of[part].append(found)
    show({f"{part} : 20": rows for part, rows in found_of.items()})
    return found_of


def show(rows: Mapping[str, list[dict[str, float]]]) -> None:
    """A table in Markdown: the mean over seeds and half a 95% interval."""
    columns = list(dict.fromkeys(column for found in rows.values() for one in found for column in one))
    print("| | seeds | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for label, found in rows.items():
        cells = []
        for column in columns:
            values = [one[column] for one in found if column in one]
            cells.append(interval(values) if values else "")
        print(f"| {label} | {len(found)} | " + " | ".join(cells) + " |", flush=True)


def draw(found_of: Mapping[int, list[dict[str, float]]], path: Path) -> None:
    """The mean grade by the ratio, on trained and on other kinds, with the range over the seeds."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.4), layout="constrained")).subplots()
    for column, label in (("mean grade", "kinds that are trained"), ("untrained: mean grade", "kinds that are not")):
        parts = [part for part, found in found_of.items() if found]
        values = [[one[column] for one in found_of[part]] for part in parts]
        means = [statistics.fmean(of) for of in values]
        below = [mean - min(of) for mean, of in zip(means, values, strict=True)]
        above = [max(of) - mean for mean, of in zip(means, values, strict=True)]
        axes.errorbar(parts, means, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xticks(SCORED_PARTS, [f"{part} : 20" for part in SCORED_PARTS], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("scored answers : right answers, in 400 responses")
    axes.set_ylabel("mean grade")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    from uft_ds.examples.smollm2 import quickstart_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="rates,seeds,mix", help="parts, separated by commas; rates are always read")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--data", type=Path, help="folder with ifeval/ and truthfulqa/, see docs/evaluation.md")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--picture", type=Path, help="where the mix is drawn")
    given = parser.parse_args()
    folder, parts = given.folder.absolute(), given.part.split(",")
    ends = time.monotonic() + 60 * given.minutes
    asked = given.methods.split(",")
    if unknown := set(asked) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown; expected some of {', '.join(METHODS)}")
    methods = tuple(name for name in METHODS if name in asked)
    study = Study(folder, quickstart_model(say=print), given.data, Results("study"), ends, methods)
    write_data(study.data)
    chosen = measure_rates(study)
    if "seeds" in parts:
        measure_seeds(study, chosen)
    if "mix" in parts and "uft" in chosen:
        found_of = measure_mix(study, chosen["uft"])
        if given.picture is not None:
            draw(found_of, given.picture)


if __name__ == "__main__":
    main()
