"""What an online step gathers under ZeRO-3: scores by a reward model, and the hand-over of the policy to a generator.

    python benchmarks/online_traffic.py [--ranks 2 4]

The same random Qwen2-shaped model, sharding and counting as in `reference_traffic.py`: all-gathers at DeepSpeed's
backend on rank 0, the bytes that they return, and invalidations of ZeRO's prefetch trace.

**Scores.** Passes without gradient over one step's answers, bytes a micro-batch:

    policy                    the policy alone: a forward of supervised fine-tuning
    reward                    uft_ds: the reward model as a stream on the policy's base
    three streams             uft_ds: policy, reference and reward model in one visit
    three visits              the same three streams, each in a call of its own
    three models              each with a base and an engine of its own, as TRL 1.16 keeps the reward model
                              (trainer/rloo_trainer.py:840-843, `prepare_deepspeed`) and, without PEFT, the reference

**Steps.** The loop of an online run without its generation: answers are scored by nothing, by the reward stream, or by
a model of its own; then policy and reference are trained. Bytes a step of both parts, lost traces, and the bytes of
weights that a rank holds. At the end of a pass without gradient ZeRO has fetched ahead what a backward would need, and
drops it: as much as its prefetch bucket, and the head; the same for any number of layers.

**Hand-over.** What rank 0 must hold to give the policy to a server: the adapter alone, or the whole base, which TRL
1.16 gathers at once to merge a LoRA under ZeRO-3 (generation/vllm_generation.py:444-469, `gather_params(list(
model.parameters()))`, called by trainer/rloo_trainer.py:1302-1303; in server mode it walks them twice before the first
step, :500-511). Bytes that are gathered, the largest number of bytes that are whole on a rank at one time, and the
bytes that are written (the folder of one version, as a served run writes it) or sent.

Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import Bar, at_most, report, table_of
from ranks import run_on_ranks
from reference_traffic import SETTINGS, Counters, counting, versions, write_model
from reward_models import Conversation, conversations, saved_reward_adapter
from rich.console import Console
from rich.table import Table
from toy import UFT, toy_model, toy_sequences

from uft_ds.data.mixture import Step
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known
from uft_ds.rollouts.adapter_versions import Adapters, write_version
from uft_ds.rollouts.handover import take_policy
from uft_ds.rollouts.stream_scorer import sequence_of, values_of
from uft_ds.streams.adapters import adapter_config_of
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.stream import Stream
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

TOKENS = 560
WARM_UP, PASSES, STEPS = 2, 1, 2
PROMPTS_PER_RANK, ANSWERS = 10, 4
SEQUENCES_PER_RANK = 20
_SECONDS = 1200
"""Longest time of one measurement: on a busy machine four ranks take minutes."""


@dataclass(frozen=True)
class Traffic:
    """Of one rank, over `micro_steps` micro-batches or steps."""

    gathers: int
    gathered_bytes: int
    invalidations: int
    micro_steps: int

    @property
    def bytes_each(self) -> float:
        return self.gathered_bytes / self.micro_steps


@dataclass(frozen=True)
class Handed:
    """Bytes of one way to hand over the policy: gathered, whole on a rank at once, and written or sent."""

    gathered: int
    whole_at_once: int
    written: int


def engine_of(folder: Path, *, reward: Path | None) -> Engine:
    config = read_deepspeed_file("zero3_cpu")
    config["zero_optimization"] |= SETTINGS
    model = toy_model(folder, gradient_checkpointing=True, reward_adapter=reward)
    return Engine(
        model,
        deepspeed_config(config, dtype=torch.float32, max_grad_norm=1e6),
        layer_class=decoder_layer_class(model.policy.get_base_model()),
        weight_decay=0.0,
    )


def answers() -> list[Conversation]:
    return conversations(PROMPTS_PER_RANK * torch.distributed.get_world_size(), ANSWERS)


def counted(work: Callable[[], int]) -> Traffic:
    """Of `PASSES` repetitions after `WARM_UP`. work: returns the number of its micro-batches or steps."""
    for _ in range(WARM_UP):  # the first ones record ZeRO's trace
        work()
    with counting() as counters:
        done = sum(work() for _ in range(PASSES))
    return _traffic(counters, done)


def _traffic(counters: Counters, done: int) -> Traffic:
    return Traffic(counters.gathers, counters.gathered_bytes, counters.invalidations, done)


def forward(engine: Engine, *visits: tuple[Stream, ...]) -> int:
    """Forward one step's answers, each micro-batch once for each visit; the number of micro-batches."""
    step = Step(0, tuple(sequence_of(prompt, answer, "") for prompt, answer in answers()))
    with engine.evaluating():
        batches = engine.micro_batches(step, TOKENS)
        for batch in batches:
            for streams in visits:
                engine(batch, streams)
    return len(batches)


def measure_visits(folder: Path, adapter: Path) -> dict[str, Traffic]:
    """On one of the ranks, of one engine: streams alone, in one visit, and each in a visit of its own."""
    engine = engine_of(folder, reward=adapter)
    policy, reference, reward = (engine.streams[name] for name in ("policy", "reference", "reward"))
    return {
        "policy": counted(lambda: forward(engine, (policy,))),
        "reward": counted(lambda: forward(engine, (reward,))),
        "three streams": counted(lambda: forward(engine, (policy, reference, reward))),
        "three visits": counted(lambda: forward(engine, (policy,), (reference,), (reward,))),
    }


def measure_scores(folder: Path, adapter: Path) -> dict[str, Traffic]:
    """On one of the ranks."""
    found = measure_visits(folder, adapter)
    # The reward model and the reference of their own: engines with one adapter each, of which one stream is asked for.
    others = [engine_of(folder, reward=None), engine_of(folder, reward=None), engine_of(folder, reward=adapter)]
    policy, reference, reward = (
        engine.streams[name] for engine, name in zip(others, ("policy", "reference", "reward"), strict=True)
    )

    def three_models() -> int:
        forward(others[0], (policy,))
        forward(others[1], (reference,))
        return forward(others[2], (reward,))

    return found | {"three models": counted(three_models)}


@dataclass(frozen=True)
class Loop:
    """Of one rank: the traffic of scoring and of training, a step each, and the bytes of the shards that it holds."""

    scoring: Traffic
    training: Traffic
    held: int

    @property
    def lost(self) -> int:
        return self.scoring.invalidations + self.training.invalidations


def measure_steps(folder: Path, adapter: Path) -> dict[str, Loop]:
    """On one of the ranks: the loop of an online run without its generation."""

    def of(engine: Engine, scorer: Engine | None) -> Loop:
        method = Method(engine, UFT, Known.of_reference("lockstep"), TOKENS)
        count = SEQUENCES_PER_RANK * torch.distributed.get_world_size()
        step = Step(0, toy_sequences(count, seed=100, longest=120))
        totals = (Counters(), Counters())
        for number in range(WARM_UP + STEPS):
            with counting() as scoring:
                if scorer is not None:
                    values_of(scorer, answers(), TOKENS)
            with counting() as training:
                run_step(method, step, 0.0)
            if number >= WARM_UP:
                for total, one in zip(totals, (scoring, training), strict=True):
                    total.gathers += one.gathers
                    total.gathered_bytes += one.gathered_bytes
                    total.invalidations += one.invalidations
        engines = {id(one): one for one in (engine, scorer) if one is not None}
        parameters: list[Any] = [p for one in engines.values() for p in one.module.parameters()]
        shards = [p.ds_tensor for p in parameters]
        held = sum(shard.numel() * shard.element_size() for shard in shards)
        return Loop(_traffic(totals[0], STEPS), _traffic(totals[1], STEPS), held)

    plain, attached = (engine_of(folder, reward=reward) for reward in (None, adapter))
    own = engine_of(folder, reward=adapter)
    return {
        "not scored": of(plain, None),
        "reward stream": of(attached, attached),
        "a model of its own": of(plain, own),
    }


def measure_handover(folder: Path, out: Path) -> dict[str, Handed]:
    """On one of the ranks; bytes written are rank 0's."""
    import deepspeed

    engine = engine_of(folder, reward=None)
    policy: Any = engine.module.policy
    with counting() as ours:
        handed = take_policy(engine, policy, 0)
    written = 0
    if engine.rank == 0:
        adapters = Adapters(out / f"adapters-{engine.world_size}", adapter_config_of(policy), "benchmark")
        version = write_version(adapters, handed.version, handed.tensors)
        written = sum(path.stat().st_size for path in version.iterdir())
    adapter_bytes = sum(p.ds_numel * p.element_size() for p in policy.parameters() if p.requires_grad)
    engine.deepspeed.optimizer.empty_partition_cache()
    parameters = list(policy.parameters())
    with counting() as theirs, deepspeed.zero.GatheredParameters(parameters):
        whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        merged = sum(p.numel() * p.element_size() for name, p in policy.named_parameters() if "lora_" not in name)
    return {
        "the adapter": Handed(ours.gathered_bytes, adapter_bytes, written),
        "the whole base": Handed(theirs.gathered_bytes, whole, merged),
    }


def bars(scores: dict[str, Traffic], steps: dict[str, Loop], handed: dict[str, Handed]) -> list[Bar]:
    """What a reward stream has to show."""
    policy, three = scores["policy"], scores["three streams"]
    attached, own = steps["reward stream"], steps["a model of its own"]
    adapter, base = handed["the adapter"], handed["the whole base"]
    return [
        at_most("three streams: bytes / a forward of SFT", three.bytes_each / policy.bytes_each, 1.0),
        at_most("reward: bytes / a forward of SFT", scores["reward"].bytes_each / policy.bytes_each, 1.0),
        at_most("three streams: bytes / three visits", three.bytes_each / scores["three visits"].bytes_each, 0.40),
        at_most("three streams: bytes / three models", three.bytes_each / scores["three models"].bytes_each, 0.40),
        at_most("invalidations in passes",
                sum(found.invalidations for found in (policy, three, scores["reward"])), 0),
        at_most("steps: lost traces, reward stream", attached.lost, 0),
        at_most("steps: weights held, (reward stream - not scored) / (a model of its own - not scored)",
                (attached.held - steps["not scored"].held) / (own.held - steps["not scored"].held), 0.05),
        at_most("hand-over: gathered / bytes of the adapter", adapter.gathered / adapter.whole_at_once, 1.05),
        at_most("hand-over: written / bytes of the adapter", adapter.written / adapter.whole_at_once, 1.05),
        at_most("hand-over: gathered, adapter / base", adapter.gathered / base.gathered, 0.05),
    ]  # fmt: skip


def shown_traffic(title: str, found: dict[str, Traffic], base: str) -> Table:
    table = table_of(title, "", "all-gathers", "MB", f"/ {base}", "invalidations")
    for name, row in found.items():
        table.add_row(
            name, f"{row.gathers / row.micro_steps:.1f}", f"{row.bytes_each / 1e6:.3f}",
            f"{row.bytes_each / found[base].bytes_each:.4f}", str(row.invalidations),
        )  # fmt: skip
    return table


def shown_steps(title: str, found: dict[str, Loop]) -> Table:
    table = table_of(title, "", "scoring MB", "training MB", "lost traces", "weights held a rank MB")
    for name, row in found.items():
        table.add_row(
            name, f"{row.scoring.bytes_each / 1e6:.3f}", f"{row.training.bytes_each / 1e6:.3f}", str(row.lost),
            f"{row.held / 1e6:.3f}",
        )  # fmt: skip
    return table


def shown_handover(title: str, found: dict[str, Handed]) -> Table:
    table = table_of(title, "", "gathered MB", "whole at once MB", "written or sent MB")
    for name, row in found.items():
        table.add_row(name, *(f"{value / 1e6:.3f}" for value in (row.gathered, row.whole_at_once, row.written)))
    return table


def of_32b() -> dict[str, Handed]:
    """The same for the shape of Qwen2.5-32B in bfloat16 with float32 adapters of rank 16, from its configuration."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from uft_ds.streams.adapters import add_adapters

    config = Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        base = Qwen2ForCausalLM(config)
    policy = add_adapters(base, rank=16, alpha=16.0, targets="all-linear", dtype=torch.float32, seed=0)
    adapter = sum(4 * p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(2 * p.numel() for p in policy.parameters() if not p.requires_grad)
    return {
        "the adapter": Handed(adapter, adapter, adapter),
        "the whole base": Handed(frozen + adapter, frozen + adapter, frozen),
    }


def measure_all(
    folder: Path, adapter: Path, ranks: int
) -> tuple[dict[str, Traffic], dict[str, Loop], dict[str, Handed]]:
    """Of rank 0."""
    return (
        run_on_ranks(measure_scores, ranks, folder, adapter, timeout_seconds=_SECONDS)[0],
        run_on_ranks(measure_steps, ranks, folder, adapter, timeout_seconds=_SECONDS)[0],
        run_on_ranks(measure_handover, ranks, folder, folder, timeout_seconds=_SECONDS)[0],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    versions()
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model")
        adapter = saved_reward_adapter(folder, Path(name) / "reward", targets="all-linear")
        for ranks in options.ranks:
            scores, steps, handed = measure_all(folder, adapter, ranks)
            console.print(shown_traffic(f"{ranks} ranks: passes without gradient, a micro-batch", scores, "policy"))
            console.print(
                shown_steps(f"{ranks} ranks: a step, of which 2 micro-batches are scored and 2 trained", steps)
            )
            console.print(shown_handover(f"{ranks} ranks: hand-over of the policy", handed))
            missed += report(console, bars(scores, steps, handed))
    console.print(shown_handover("the shape of Qwen2.5-32B, computed", of_32b()))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
