"""A hundred steps of the small real model on real instruction and scored rows: what rises, what falls.

    python benchmarks/real_data.py [--steps 120] [--folder runs/real_data]

Needs real data: UFT_TEST_DATA names the folder with `dolly_hhrlhf/` (instruction) and `ultrafeedback/` (two scored
responses a prompt, 1 to 10, so score = (s - 1) / 9). Rows are kept short for a CPU. Prints the loss and the implicit
rewards at the start and at the end, the held-out rewards by score, and samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from real_rows import real_rows_folder

SCORE_BANDS = ((0.0, 0.35), (0.35, 0.65), (0.65, 1.01))
QUESTIONS = ("Why is the sky blue?", "Give three tips for better sleep.", "Who wrote Hamlet?")


def short(*texts: str) -> bool:
    return all(0 < len(text.strip()) <= 350 for text in texts)


def instruction_rows(data: Path) -> list[dict[str, Any]]:
    """Dolly and HH rows in Alpaca's template, the template taken off."""
    rows = []
    for line in (data / "dolly_hhrlhf" / "train_small.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            prompt = row["prompt"].split("### Instruction:\n", 1)[-1].rsplit("\n\n### Response", 1)[0].strip()
            if short(prompt, row["response"]):
                rows.append({"prompt": prompt, "response": row["response"].strip()})
    return rows


def scored_rows(data: Path, split: str) -> list[dict[str, Any]]:
    """Both responses of each UltraFeedback pair, with their scores on [0, 1]."""
    rows = []
    for line in (data / "ultrafeedback" / f"{split}_clean.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                if short(row["prompt"], row[side]):
                    score = (row["metadata"][f"score_{side}"] - 1) / 9
                    rows.append({"prompt": row["prompt"].strip(), "response": row[side].strip(), "score": score})
    return rows


def write_recipe(data: Path, base: Path, folder: Path, *, steps: int, beta: float = 0.03) -> Path:
    """The files of rows, a kind each, and a recipe over them."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    instruction = instruction_rows(data)
    files = {
        "instruction": instruction[:-16],
        "scored": scored_rows(data, "train"),
        "held_out_instruction": instruction[-16:],
        "held_out_scored": scored_rows(data, "eval")[:48],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def source(name: str) -> dict[str, str]:
        return {"format": "jsonl", "path": str(folder / f"{name}.jsonl")}

    recipe = {
        "name": "real_data",
        "model": {"base": str(base), "dtype": "float32", "gradient_checkpointing": False},
        "lora": {"rank": 16, "alpha": 16.0},
        "data": {
            "max_length": 256,
            "sources": [source("instruction"), source("scored")],
            "held_out": [source("held_out_instruction"), source("held_out_scored")],
        },
        "objective": {"loss": "mse", "beta": beta},
        "train": {
            "examples_per_step": 8,
            "tokens_per_micro_batch": 1024,
            "steps": steps,
            "lr": 3e-4,
            "evaluate_every": max(1, steps // 3),
            "checkpoint_every": steps,
        },
        "deepspeed": "zero3_cpu",
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def held_out_by_score(run: Path, base: Path) -> None:
    """Implicit rewards of held-out responses, by kind and score, through Hugging Face's own forward."""
    from log_probs import hugging_face_logps
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from uft_ds.recipe.to_settings import load_settings
    from uft_ds.record.run_folder import RunFolder
    from uft_ds.run.prepare import open_data

    settings = load_settings(str(run / "recipe.yaml"))
    held_out = [source.selection for source in open_data(settings, RunFolder(run)).held_out]
    sequences = tuple(s for selection in held_out for index in range(len(selection)) for s in selection.unit(index))
    beta = settings.given.beta
    assert isinstance(beta, float)  # one for all kinds
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "latest" / "adapter"))
    ratios = hugging_face_logps(policy, sequences) - hugging_face_logps(policy, sequences, adapters=False)
    responses = [response for sequence in sequences for response in sequence.responses]
    groups = {"instruction": [i for i, r in enumerate(responses) if r.kind == "instruction"]}
    for low, high in SCORE_BANDS:
        members = [i for i, r in enumerate(responses) if r.kind == "score" and low <= r.score < high]
        groups[f"score in [{low}, {min(high, 1)}{')' if high <= 1 else ']'}"] = members
    for name, members in groups.items():
        if members:
            rewards = [beta * float(ratios[i]) for i in members]
            risen = sum(reward > 0 for reward in rewards)
            mean = sum(rewards) / len(rewards)
            shown = f"{len(members):3} responses  mean reward {mean:+.3f}  risen {risen}/{len(members)}"
            print(f"  held out, {name:22}  {shown}")


def print_curve(run: Path) -> None:
    from uft_ds.record.metrics_file import read_metrics

    lines = [line for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line]
    quarter = max(1, len(lines) // 4)
    print("  means over the first and the last quarter of the steps")
    for name in (
        "loss",
        *(f"{n}/{k}" for n in ("loss", "implicit_reward", "saturated") for k in ("instruction", "score")),
    ):
        values = [line[name] for line in lines if line.get(name) is not None]
        first, last = (sum(part) / len(part) for part in (values[:quarter], values[-quarter:]))
        print(f"  {name:28} {first:+.4f} -> {last:+.4f}")


def print_samples(base: Path, merged: Path) -> None:
    from uft_ds.evaluation.generate import generate_responses, load_for_generation

    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = [generate_responses(*load_for_generation(path), prompts, max_new_tokens=60) for path in (base, merged)]
    for question, before, after in zip(QUESTIONS, *answers, strict=True):
        print(f"  {question}\n    before: {' '.join(before.split())}\n    after:  {' '.join(after.split())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_data"))
    options = parser.parse_args()
    data = real_rows_folder()
    if not data.is_dir():
        sys.exit(f"no real data at {data}; set UFT_TEST_DATA")
    from uft_ds.examples.smollm2 import quickstart_model

    base = quickstart_model()
    recipe = write_recipe(data, base, options.folder, steps=options.steps)
    command = [sys.executable, "-m", "uft_ds"]
    run, merged = options.folder / "run", options.folder / "merged"
    subprocess.run([*command, "train", str(recipe), "--overwrite"], check=True)
    shutil.rmtree(merged, ignore_errors=True)
    subprocess.run([*command, "convert", str(run), str(merged)], check=True)
    print_curve(run)
    held_out_by_score(run, base)
    print_samples(base, merged)


if __name__ == "__main__":
    main()
