"""Invariants 2 and 6 of a reward model: whoever holds what, its step is that of Hugging Face's own classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of
from mixtures import TARGETS
from peft import LoraConfig, get_peft_model
from ranks import run_on_ranks
from tiny import VOCAB_SIZE
from torch import Tensor
from toy import toy_model
from transformers import AutoModelForSequenceClassification

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.mixture import Step
from uft_ds.engine.groups import ADAPTERS, HEAD, ParameterGroup
from uft_ds.known.cache import Known
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.streams.stream import REWARD
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

OBJECTIVE = Objective(
    {
        "instruction": KindObjective({"bce": 1.0}),
        "score": KindObjective({"mse": 1.0}, weight=0.5),
        "binary": KindObjective({"bce": 1.0}, weight=2.0),
        "pair": KindObjective({"bradley_terry": 1.0}),
    },
    constants=PairConstants(score_margin=True, centering=0.03),
    reward="head",
)
MODEL: dict[str, Any] = {"further": (REWARD,), "reference_mode": "separate"}
RATE, HEAD_SCALE = 1e-2, 0.25


def step_of_pairs() -> Step:
    """Three pairs whose sides share a prompt, three conversations with two scored answers, three labelled answers."""
    rng = np.random.default_rng(4)
    sequences: list[Sequence] = []

    def tokens(length: int) -> np.ndarray:
        return rng.integers(3, VOCAB_SIZE, size=length).astype(np.int32)

    def add(prompt: np.ndarray, kind: Kind, score: float, pair_id: int | None = None) -> None:
        ids = np.concatenate([prompt, tokens(int(rng.integers(2, 25)))])
        response = Response(len(prompt), len(ids), score, kind, f"toy:{len(sequences)}", pair_id)
        sequences.append(Sequence(ids, (response,)))

    for number in range(3):
        shared = tokens(int(rng.integers(4, 12)))
        add(shared, "pair", 0.9, number)
        add(shared, "pair", 0.2 + 0.1 * number, number)
        first, second = (Response(a, b, s, "score", f"toy:{number}.{a}") for a, b, s in ((3, 7, 0.1), (11, 19, 0.8)))
        sequences.append(Sequence(tokens(19), (first, second)))
        add(tokens(5), "binary", float(number % 2))
    return Step(0, tuple(sequences))


def groups_of(model: Any) -> tuple[ParameterGroup, ...]:
    adapters = tuple(p for p in model.policy.parameters() if p.requires_grad)
    return ParameterGroup(ADAPTERS, adapters), ParameterGroup(HEAD, tuple(model.scores.parameters()), HEAD_SCALE)


def sharded_step(folder: Path, tokens: int, file: str, options: dict[str, Any]) -> Any:
    """Gradients, metrics and new weights of one step through the real engine, and held-out metrics before it."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(folder, file=file, groups_of=groups_of, **(MODEL | options))
    grads: dict[str, Tensor] = {}
    update = engine.step

    def recording(rate: float, loss: Tensor) -> Any:
        named = engine.module.named_parameters()
        grads.update({name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad})
        return update(rate, loss)

    engine.step = recording  # type: ignore[method-assign]
    method = Method(engine, OBJECTIVE, Known.of_reference("none"), tokens)
    held_out = evaluate(method, [step_of_pairs()]).metrics
    outcome = run_step(method, step_of_pairs(), RATE)
    assert not outcome.result.skipped
    with engine.gathered_trainable() as named:
        weights = {name: tensor.clone() for name, tensor in named.items()}
    return grads, outcome.metrics, weights, held_out


def definition(folder: Path, targets: Any = "all-linear") -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Each response's text alone through Hugging Face's classifier in float64, and the losses as they are written.

    Returns: the values by origin, the gradients by our names, the step's loss.
    """
    ours = toy_model(folder, targets=targets, **MODEL)
    start = {name: p.detach().double() for name, p in ours.named_parameters() if p.requires_grad}
    plain: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float64, experts_implementation="eager"
    )  # experts one after the other: torch's grouped product knows no float64
    lora = LoraConfig(r=4, lora_alpha=8.0, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(plain, lora, autocast_adapter_dtype=False)

    def our_name(name: str) -> str:
        return "scores.reward.weight" if ".score." in name else f"policy.{name}"

    trained = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(start)
    for name, parameter in trained.items():
        parameter.data = start[name].clone()
    model.config.pad_token_id = None  # the last token of each row, which has no padding
    step = step_of_pairs()
    values: dict[str, Tensor] = {}
    for sequence in step.sequences:
        for response in sequence.responses:
            ids = torch.from_numpy(sequence.token_ids_T[: response.end].astype(np.int64))
            values[response.origin] = model(input_ids=ids[None]).logits[0, 0]
    of_kind: dict[str, list[Tensor]] = {"score": [], "binary": [], "pair": []}
    chosen: Response | None = None
    for response in step.responses:
        r, s = values[response.origin], response.score
        if response.kind == "score":
            of_kind["score"].append(0.5 * (torch.sigmoid(r) - s) ** 2)
        elif response.kind == "binary":
            of_kind["binary"].append(2.0 * -(s * torch.sigmoid(r).log() + (1 - s) * torch.sigmoid(-r).log()))
        elif chosen is None:
            chosen = response
        else:
            r_chosen = values[chosen.origin]
            term = -torch.sigmoid(r_chosen - r - (chosen.score - s)).log() + 0.03 * (r_chosen + r) ** 2
            of_kind["pair"].append(term)
            chosen = None
    loss = sum(torch.stack(terms).mean() for terms in of_kind.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
    return {origin: value.detach() for origin, value in values.items()}, grads, float(loss.detach())


@pytest.mark.parametrize(
    ("world_size", "tokens", "file", "options"),
    [
        pytest.param(1, 512, "zero3_cpu", {}, marks=pytest.mark.long),
        (2, 64, "zero3_cpu", {"gradient_checkpointing": True}),
        pytest.param(2, 60, "zero2", {"gradient_checkpointing": "selective"}, marks=pytest.mark.long),
        pytest.param(2, 96, "zero3_cpu", {"attention": "packed", "share_prompts": True}, marks=pytest.mark.long),
        pytest.param(
            4, 64, "zero3_cpu", {"activation_offload": True, "gradient_checkpointing": True}, marks=pytest.mark.long
        ),
        pytest.param(
            4,
            40,
            "zero3_cpu",
            {"attention": "packed", "share_prompts": True, "sequence_size": 2},
            marks=pytest.mark.long,
        ),
    ],
    ids=["one rank", "checkpointed", "ZeRO-2, selective", "shared prompts", "four ranks, offload", "divided rows"],
)
def test_invariant_2_a_reward_models_step_is_hugging_faces(
    tiny_qwen2: Path, world_size: int, tokens: int, file: str, options: dict[str, Any]
) -> None:
    """Gradients of adapters and head, to 1e-5 of each tensor's largest entry, the loss, and the metrics by hand."""
    check_step(tiny_qwen2, world_size, tokens, file, options)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"attention": "packed", "share_prompts": True, "sequence_size": 2, "gradient_checkpointing": "selective"},
    ],
    ids=["two ranks", "divided rows"],
)
def test_invariant_2_so_it_is_on_a_mixture_of_experts(qwen3_moe: Path, options: dict[str, Any]) -> None:
    """With adapters on the attention; its experts get other tokens on each rank, and when they are computed again."""
    check_step(qwen3_moe, 2, 64, "zero3_cpu", options | {"targets": TARGETS})


def check_step(base: Path, world_size: int, tokens: int, file: str, options: dict[str, Any]) -> None:
    targets = options.get("targets", "all-linear")
    values, expected, loss = definition(base, targets)
    for grads, metrics, weights, held_out in run_on_ranks(sharded_step, world_size, base, tokens, file, options):
        assert set(grads) == set(expected)
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
        norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
        assert held_out["held_out/loss"] == pytest.approx(loss, rel=1e-6)
        check_metrics(metrics, values)
        check_update(base, targets, weights, grads)


def check_metrics(metrics: dict[str, float], values: dict[str, Tensor]) -> None:
    by_kind: dict[str, list[float]] = {}
    for response in step_of_pairs().responses:
        by_kind.setdefault(response.kind, []).append(float(values[response.origin]))
    for kind, rewards in by_kind.items():
        assert metrics[f"reward/{kind}"] == pytest.approx(np.mean(rewards), abs=1e-5)
        assert metrics[f"reward_std/{kind}"] == pytest.approx(np.std(rewards), abs=1e-5)
        of_policy = {f"{name}/{kind}" for name in ("entropy", "log_ratio", "implicit_reward", "logp_chosen")}
        assert not of_policy & set(metrics)
    margins = np.subtract(by_kind["pair"][::2], by_kind["pair"][1::2])
    assert metrics["pair_margin/pair"] == pytest.approx(margins.mean(), abs=1e-5)
    assert metrics["pair_accuracy/pair"] == (margins > 0).mean()


def check_update(folder: Path, targets: Any, weights: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """AdamW's first step: each weight moves by its group's rate against its gradient's sign."""
    model = toy_model(folder, targets=targets, **MODEL)
    start = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        rate = RATE * (HEAD_SCALE if name.startswith("scores.") else 1.0)
        clear = grad.abs() > 1e-5
        moved = (weights[name] - start[name])[clear]
        torch.testing.assert_close(moved, -rate * grad[clear].sign(), rtol=2e-2, atol=0)
