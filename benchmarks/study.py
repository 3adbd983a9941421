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
    questions of each, asked the first seed alone, as they take longer than the training. Of online methods the mean
    log-ratio at the end, which is the KL that was spent, and seconds of a step by phase.
mix: UFT with five ratios of right answers to scored ones, those of the paper's ablation, three seeds each.

A run that has a line in `results/study.jsonl` is not run again. With --methods no other method is run (those of two
stages need `sft` first), so that two machines can share the work; their lines are put into one file. With --minutes no
run is begun after so many; the table shows what there is. Two to six minutes a run on two cores; some 50 + 56 + 15
runs. `--picture FILE` draws the mix.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from quickstart_runs import Results, interval, policy_of
from study_data import write_data
from study_measures import graded, measured
from study_methods import METHODS
from study_runs import Study

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES, SECOND_STAGE = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3, 3e-3)
"""Those that every method is measured with. A second stage may leave its start as it is, which a low rate shows."""
RATE_SEED, SEEDS, MIX_SEEDS = 100, (1, 2, 3, 4, 5), (1, 2, 3)
SCORED_PARTS = (16, 32, 65, 130, 260)
"""Scored rows for 20 instruction rows, in thousands (arXiv 2410.21438, the ablation of the data's mix)."""


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
    show_differences(rows)


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


def show_differences(rows: Mapping[str, list[dict[str, float]]]) -> None:
    """A table in Markdown: mean grades minus those of SFT, and of UFT, on the same seeds; mean and half an interval."""
    labels = [METHODS[name].label for name in ("sft", "uft")]
    complete = {label: found for label, found in rows.items() if len(found) == len(SEEDS)}
    print("| mean grade minus that of | " + " | ".join(labels) + " |\n|" + "---|" * (len(labels) + 1))
    for label, found in complete.items():
        cells = []
        for other in labels:
            pairs = zip(found, complete.get(other, ()), strict=False)
            differences = [one["mean grade"] - another["mean grade"] for one, another in pairs]
            cells.append(interval(differences) if differences and label != other else "")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


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
