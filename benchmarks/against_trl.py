"""TRL's trainers beside us: the same model, rows, adapter, optimiser and DeepSpeed file, on two CPU ranks.

    python benchmarks/against_trl.py [--only tiny,kto,dpo] [--model FOLDER]

TRL's nearest objective to UFT is KTO with `loss_type="apo_zero_unpaired"`, which is our `loss: l1` on scores 0 and 1.
Its DPO is our `loss: dpo`. Both sides train LoRA under ZeRO-3 with gradient checkpointing; TRL pads, and runs a policy
and a reference forward, each its own call. Our side is what a recipe gets by default: packed attention, and a prompt
that both answers of a pair begin with is forwarded once; then the same with `gradient_checkpointing: selective`.

Two models. The tiny one is a microbenchmark of communication: its arithmetic is nothing, so it shows what the
collectives of ZeRO's partitioning cost. On the real 135M one, arithmetic dominates. Tokens are real ones, padding is
not counted, and a prompt counts with each answer.

Rows of the real model, below UFT_TEST_DATA: `llama_factory/kto_en_demo.json` (a sample of KTO-mix) and
`ultrafeedback/train_clean.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import process_costs
from bars import Bar, report, table_of
from ranks import run_on_ranks
from rich.console import Console
from rich.table import Table
from toy import objective

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.streams.recompute import Recompute

RANKS, LORA_RANK, ALPHA, BETA = 2, 8, 16.0, 0.1
WARM_UP_STEPS, LOSSES_COMPARED = 2, 5


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


@dataclass(frozen=True)
class Result:
    """Of one rank: the loss of each step (of this rank's rows, or of all), seconds of a step, and the growth of its
    resident memory over that of the engine before the first step; on a GPU the peak of all that is allocated."""

    losses: list[float]
    seconds: list[float]
    peak_growth_bytes: int


def deepspeed_file(work: Workload, *, own_linear: bool = True) -> dict[str, Any]:
    from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file

    file = read_deepspeed_file(work.deepspeed)
    file["zero_optimization"] |= work.zero
    return deepspeed_config(file, dtype=work.dtype, max_grad_norm=1.0, own_linear=own_linear)


def reset_peak() -> int:
    """Start the peak of memory anew; the bytes from which it is counted."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    return process_costs.reset_peak()


def peak() -> int:
    """The peak of memory since `reset_peak`, bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return process_costs.peak_rss()


# ---- ours


def run_ours(work: Workload, adapter: Path, recompute: Recompute) -> Result:
    from uft_ds.data.mixture import Step
    from uft_ds.data.packing import Packing
    from uft_ds.engine.engine import Engine, partitioned_loading
    from uft_ds.known.cache import Known
    from uft_ds.streams.adapters import add_adapters
    from uft_ds.streams.load import decoder_layer_class, load_base
    from uft_ds.streams.model import UFTModel
    from uft_ds.training.forwarding import Method
    from uft_ds.training.step import run_step

    config = deepspeed_file(work, own_linear=recompute != "selective")
    with partitioned_loading(config):
        base = load_base(
            str(work.folder),
            revision=None,
            dtype=work.dtype,
            attention="packed",
            gradient_checkpointing=recompute,
        )
    policy = add_adapters(base, rank=LORA_RANK, alpha=ALPHA, targets="all-linear", dtype=torch.float32, seed=1)
    start_from(policy, adapter)
    engine = Engine(
        UFTModel(policy),
        config,
        layer_class=decoder_layer_class(base),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        packing=Packing(share_prompts=True),
    )
    method = Method(engine, objective(work.loss, BETA), Known.of_reference("lockstep"), 1 << 20)
    losses, seconds, base_bytes = [], [], reset_peak()
    rows_per_step = work.ranks * work.rows_per_rank
    for index in range(work.steps):
        rows = work.rows[index * rows_per_step : (index + 1) * rows_per_step]
        step = Step(index, tuple(sequence for number, row in enumerate(rows) for sequence in sequences(row, number)))
        started = time.perf_counter()
        metrics = run_step(method, step, work.learning_rate).metrics
        seconds.append(time.perf_counter() - started)
        losses.append(metrics["loss"])
    return Result(losses, seconds, peak() - base_bytes)


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


# ---- theirs


def run_trl(work: Workload, adapter: Path, leaf: bool) -> Result:
    # accelerate looks for DeepSpeed only where it is told to; and on a CPU it believes in one process.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from datasets import Dataset
    from deepspeed.utils import set_z3_leaf_modules
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from uft_ds.host.process import returning_freed_memory

    losses: list[float] = []
    seconds: list[float] = []
    memory: list[int] = []

    config: Any
    parent, config, loss_type = (
        (KTOTrainer, KTOConfig, "apo_zero_unpaired") if work.loss == "l1" else (DPOTrainer, DPOConfig, "sigmoid")
    )

    class Trainer(parent):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already: the very rows that we train on

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            losses.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not seconds:  # the engine stands, nothing has been forwarded
                memory.append(reset_peak())
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as output:
        settings = config(
            output_dir=output, loss_type=loss_type, beta=BETA, learning_rate=work.learning_rate,
            per_device_train_batch_size=work.rows_per_rank, gradient_accumulation_steps=1, max_steps=work.steps,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, adam_beta2=0.999,
            gradient_checkpointing=True, deepspeed=left_to_trainer(deepspeed_file(work)),
            bf16=work.dtype == torch.bfloat16,
            max_length=None,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
            dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        if not torch.cuda.is_available():
            believe_in_all_ranks()
        with returning_freed_memory():  # as our loading does: memory is compared
            model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=work.dtype, attn_implementation="sdpa")
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(work.rows),
            processing_class=AutoTokenizer.from_pretrained(work.folder),
            peft_config=LoraConfig(
                r=LORA_RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
            ),
            callbacks=[Clock()],
        )
        start_from(trainer.model, adapter)
        if leaf:
            set_z3_leaf_modules(trainer.model, [type(model.get_decoder().layers[0])])
        trainer.train()
    return Result(losses, seconds, peak() - memory[0])


def left_to_trainer(config: dict[str, Any]) -> dict[str, Any]:
    owned = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return config | dict.fromkeys(owned, "auto")


def believe_in_all_ranks() -> None:
    """On a CPU with DeepSpeed accelerate takes each rank for the only one: all would get the same rows."""
    from accelerate.state import PartialState

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    PartialState._shared_state.update(num_processes=world_size, process_index=rank, local_process_index=rank)


def start_from(policy: Any, adapter: Path) -> None:
    """Both sides start from the same file: A drawn once, B zero."""
    from safetensors.torch import load_file

    tensors = load_file(adapter)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            own = tensors[name.split("base_model.model.", 1)[1]]
            parameter.data = own.to(parameter.device, parameter.dtype, copy=True)


def write_adapter(base: Path, adapter: Path) -> None:
    from safetensors.torch import save_file

    from uft_ds.streams.adapters import add_adapters
    from uft_ds.streams.load import load_base

    model = load_base(str(base), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    policy = add_adapters(model, rank=LORA_RANK, alpha=ALPHA, targets="all-linear", dtype=torch.float32, seed=1)
    prefix = "base_model.model."
    save_file({n.removeprefix(prefix): p.detach() for n, p in policy.named_parameters() if "lora_" in n}, adapter)


# ---- rows


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


# ---- side by side


def lengths(row: dict[str, Any]) -> list[int]:
    """Tokens of a row's sequences, the prompt with each answer."""
    return [sequence.num_tokens for sequence in sequences(row, 0)]


def real_tokens(work: Workload, step: int) -> int:
    rows_per_step = work.ranks * work.rows_per_rank
    rows = work.rows[step * rows_per_step : (step + 1) * rows_per_step]
    return sum(sum(lengths(row)) for row in rows)


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


def tokens_per_second(work: Workload, results: list[Result]) -> float:
    """Real tokens of the steps after the warm-up, over the time that the slower rank took."""
    steps = range(WARM_UP_STEPS, work.steps)
    elapsed = sum(max(result.seconds[step] for result in results) for step in steps)
    return sum(real_tokens(work, step) for step in steps) / elapsed


def faster(work: Workload, one: list[Result] | None, other: list[Result]) -> list[Result]:
    return other if one is None or tokens_per_second(work, other) > tokens_per_second(work, one) else one


def losses_over_ranks(results: list[Result]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(r.losses for r in results), strict=True)]


BARS: dict[str, tuple[float, str]] = {"tiny": (5.0, "tokens/s"), "kto": (3.5, "tokens/s"), "dpo": (3.0, "tokens/s")}
"""What our side is to reach over TRL's, without a setting that TRL's trainer does not have; pairs are counted by their
responses' tokens, so tokens/s are responses/s."""


def compare(console: Console, model: Path | None, only: tuple[str, ...] = tuple(BARS)) -> list[Bar]:
    """Print a table for each workload and return the bars."""
    from importlib.metadata import version

    from reference_traffic import SETTINGS, VOCABULARY, largest, write_model

    measured: list[Bar] = []
    with tempfile.TemporaryDirectory() as name:
        tiny = write_model(Path(name) / "tiny")
        work = {"tiny": tiny_workload(tiny, SETTINGS, VOCABULARY)}
        data = Path(os.environ.get("UFT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
        real = model or real_model()
        if real is None or not data.is_dir():
            console.print(f"no real model or no real rows ({data}): the real workloads are left out", style="yellow")
        else:
            work |= {"kto": kto_workload(real, data), "dpo": dpo_workload(real, data)}
        for key, workload in ((key, workload) for key, workload in work.items() if key in only):
            adapter = Path(name) / f"adapter-{key}.safetensors"
            write_adapter(workload.folder, adapter)
            sides: dict[str, list[Result]] = {}
            for _ in range(workload.rounds):  # in turn, so that what else the machine does meets all of them
                for label, run, how in (
                    ("uft_ds", run_ours, True),
                    ("uft_ds, selective", run_ours, "selective"),
                    (f"TRL {version('trl')}", run_trl, False),
                    ("TRL, leaf modules", run_trl, True),
                ):
                    results = run_on_ranks(run, RANKS, workload, adapter, how, timeout_seconds=3000)
                    sides[label] = faster(workload, sides.get(label), results)
            console.print(_table(workload, sides))
            ours, selective, theirs, leaf = sides.values()
            least, unit = BARS[key]
            for label, side, other, bar in (
                ("TRL", ours, theirs, least),
                ("TRL with leaf modules", ours, leaf, 1.2),
                ("checkpointing whole layers", selective, ours, 1.0),
            ):
                ratio = tokens_per_second(workload, side) / tokens_per_second(workload, other)
                measured.append(Bar(f"{workload.label}: {unit} over {label} >= {bar}", ratio, ratio >= bar))
            for label, losses in (
                ("TRL", losses_over_ranks(theirs)),
                ("TRL with leaf modules", losses_over_ranks(leaf)),
                ("selective", selective[0].losses),
            ):
                worst = largest(abs(a - b) for a, b in list(zip(ours[0].losses, losses, strict=True))[:LOSSES_COMPARED])
                claim = f"{workload.label}: losses of the first {LOSSES_COMPARED} steps against {label} <= 1e-4"
                measured.append(Bar(claim, worst, worst <= 1e-4))
    return measured


def real_model() -> Path | None:
    from uft_ds.examples.smollm2 import NAME, default_cache_dir, is_complete

    folder = default_cache_dir() / NAME
    return folder if is_complete(folder) else None


def _table(work: Workload, sides: dict[str, list[Result]]) -> Table:
    steps = range(work.steps)
    padding = sum(padded_tokens(work, s) for s in steps) / sum(real_tokens(work, s) for s in steps)
    title = (
        f"{work.label}: {work.ranks} ranks x {work.rows_per_rank} rows a step; "
        f"TRL forwards {padding:.2f} tokens a real one"
    )
    table = table_of(title, "", "tokens/s, TRL = 1", "peak memory, TRL = 1", "loss, first 5 steps")
    theirs = next(results for name, results in sides.items() if name.startswith("TRL "))
    for name, results in sides.items():
        speed = tokens_per_second(work, results) / tokens_per_second(work, theirs)
        peak = max(r.peak_growth_bytes for r in results) / max(r.peak_growth_bytes for r in theirs)
        losses = results[0].losses if name.startswith("uft_ds") else losses_over_ranks(results)
        shown = " ".join(f"{loss:.4f}" for loss in losses[:LOSSES_COMPARED])
        table.add_row(name, f"{speed:.2f}", f"{peak:.2f}", shown)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BARS), help="workloads, separated by commas")
    parser.add_argument("--model", type=Path, help="a small real model; by default the quickstart's")
    options = parser.parse_args()
    from reference_traffic import versions

    versions()
    console = Console(width=120, highlight=False)
    return 1 if report(console, compare(console, options.model, tuple(options.only.split(",")))) else 0


if __name__ == "__main__":
    sys.exit(main())
