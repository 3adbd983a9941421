"""A reward model as one more frozen stream, on real ranks: the right rewards, and no effect on the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Heard, at, engine_of, writer_of
from ranks import run_on_ranks
from reward_models import Conversation, conversations, rewards_by_peft, saved_reward_adapter
from safetensors.torch import load_file
from suites import long_but
from torch import Tensor
from toy import UFT, toy_step

from uft_ds.checkpoint.folder import latest_checkpoint
from uft_ds.checkpoint.generators import seed_generators
from uft_ds.engine.engine import Engine
from uft_ds.engine.optimizer_state import pieces_of
from uft_ds.known.cache import Known
from uft_ds.rollouts.answers import Answer, Answers, Question, Unanswered
from uft_ds.rollouts.stream_scorer import StreamScorer, values_of
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

TOKENS = 64
GIVEN = conversations(groups=5)


@pytest.fixture(scope="module")
def adapter(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another rank, scale and other layers than the policy's adapter."""
    return saved_reward_adapter(tiny_qwen2, tmp_path_factory.mktemp("reward") / "adapter")


def values_on_a_rank(base: Path, file: str, options: dict[str, Any]) -> list[float]:
    engine = engine_of(base, file=file, **options)
    # The second conversation alone is less than a micro-batch a rank: the others forward the dummy.
    return values_of(engine, GIVEN, TOKENS) + values_of(engine, GIVEN[1:2], TOKENS) + values_of(engine, [], TOKENS)


@pytest.mark.parametrize(
    ("world_size", "file", "options"),
    [
        pytest.param(1, "zero3_cpu", {}, marks=pytest.mark.long),
        (2, "zero3_cpu", {"gradient_checkpointing": True}),
        pytest.param(2, "zero2", {}, marks=pytest.mark.long),
        pytest.param(2, "zero3_cpu", {"attention": "packed", "share_prompts": True}, marks=pytest.mark.long),
        pytest.param(2, "zero3_cpu", {"reference_mode": "separate"}, marks=pytest.mark.long),
        pytest.param(4, "zero3_cpu", {}, marks=pytest.mark.long),
        pytest.param(
            4, "zero3_cpu", {"attention": "packed", "share_prompts": True, "sequence_size": 2}, marks=pytest.mark.long
        ),
    ],
    ids=["one rank", "two ranks", "ZeRO-2", "shared prompts", "separate forwards", "four ranks", "divided rows"],
)
def test_rewards_are_hugging_faces_on_any_ranks(
    tiny_qwen2: Path, adapter: Path, world_size: int, file: str, options: dict[str, Any]
) -> None:
    """Every rank has all of them, in the order of the answers: those of transformers' classifier and PEFT for each
    conversation alone, to 1e-5."""
    expected_R = rewards_by_peft(tiny_qwen2, adapter, GIVEN)
    assert expected_R.std() > 0.1, "the rewards should differ"
    options = {"reward_adapter": adapter} | options
    first, *others = run_on_ranks(values_on_a_rank, world_size, tiny_qwen2, file, options)
    assert all(values == first for values in others)
    assert len(first) == len(GIVEN) + 1
    torch.testing.assert_close(torch.tensor(first[:-1]), expected_R, rtol=0, atol=1e-5)
    assert first[-1] == pytest.approx(float(expected_R[1]), abs=1e-5)


def step_of_answers(given: list[Conversation]) -> tuple[list[int], list[Question], list[Answers]]:
    """Four prompts of two sources: answered, unanswered, with a cut answer, and of another scorer."""
    questions = [Question(given[3 * number][0], 3, number) for number in range(4)]
    answers: list[Answers] = [
        tuple(Answer(ids, ended=True) for _, ids in given[3 * number : 3 * number + 3]) for number in range(4)
    ]
    answers[1] = Unanswered("timed out twice")
    whole = answers[2]
    assert not isinstance(whole, Unanswered)
    answers[2] = (*whole[:2], Answer(whole[2].token_ids[:-1] or (5,), ended=False))
    return [0, 0, 0, 1], questions, answers


def rewards_on_a_rank(base: Path, adapter: Path) -> list[dict[int, tuple[float, ...]]]:
    engine = engine_of(base, reward_adapter=adapter)
    return [
        StreamScorer(engine, TOKENS, frozenset({0}), truncated).rewards(*step_of_answers(GIVEN))
        for truncated in ("score", "drop")
    ]


def test_only_answers_that_are_used_have_a_reward(tiny_qwen2: Path, adapter: Path) -> None:
    """Not those of another scorer's source, nor of a prompt that is left out. An answer that was cut is read at its
    last token as it was sampled: none is added."""
    scored, dropped = run_on_ranks(rewards_on_a_rank, 2, tiny_qwen2, adapter)[1]
    assert set(scored) == {0, 2}
    assert set(dropped) == {0}
    _, questions, answers = step_of_answers(GIVEN)
    for place in scored:
        of = answers[place]
        assert not isinstance(of, Unanswered)
        expected_R = rewards_by_peft(
            tiny_qwen2, adapter, [(questions[place].token_ids, answer.token_ids) for answer in of]
        )
        torch.testing.assert_close(torch.tensor(scored[place]), expected_R, rtol=0, atol=1e-5)
    cut = answers[2][2]  # type: ignore[index]
    assert not cut.ended
    assert cut.token_ids[-1] != 2


def recorded_steps(base: Path, file: str, adapter: Path | None, folder: Path) -> dict[str, Any]:
    """Two optimiser steps; with a reward model, its pass comes before each. Gradients, metrics, weights, and a
    checkpoint."""
    from deepspeed.utils import safe_get_full_grad

    seed_generators(0)  # as a run does; a checkpoint holds their states
    options: dict[str, Any] = {} if adapter is None else {"reward_adapter": adapter}
    engine = engine_of(base, file=file, gradient_checkpointing=True, max_grad_norm=0.5, **options)
    grads: list[dict[str, Tensor]] = []
    update = engine.step

    def recording(rate: float, loss: Tensor) -> Any:
        named = engine.module.named_parameters()
        grads.append({name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad})
        return update(rate, loss)

    engine.step = recording  # type: ignore[method-assign]
    method = Method(engine, UFT, Known.of_reference("lockstep"), TOKENS)
    metrics = []
    for number in range(2):
        if adapter is not None:
            values_of(engine, GIVEN, TOKENS)
        metrics.append(run_step(method, toy_step(seed=number), 1e-2).metrics)
    with engine.gathered_trainable() as named:
        weights = {name: tensor.clone() for name, tensor in named.items()}
    files = saved(engine, folder)
    return {"grads": grads, "metrics": metrics, "weights": weights, "files": files, "held": held_by(engine)}


def saved(engine: Engine, folder: Path) -> dict[str, Any]:
    writer = writer_of(engine, folder, Heard())
    writer.start(at(2), Known.of_reference("lockstep"))
    writer.finish()
    checkpoint = latest_checkpoint(folder)
    return {
        str(path.relative_to(checkpoint)): load_file(path) if path.suffix == ".safetensors" else path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def held_by(engine: Engine) -> set[str]:
    """The names of the parameters for which the optimiser holds state."""
    return {piece.name for piece in pieces_of(engine.deepspeed)}


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{where}/{number}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("file", long_but(["zero3_cpu"], ["zero3_cpu", "zero2"]))
def test_a_policy_is_trained_as_without_the_reward_model(
    tiny_qwen2: Path, adapter: Path, tmp_path: Path, file: str
) -> None:
    """Gradients, norms, updates, metrics and the checkpoint of two steps, each after a pass of the reward model over
    other answers: bit for bit those of a run that has none. Optimiser and checkpoint hold nothing of it."""
    plain = run_on_ranks(recorded_steps, 2, tiny_qwen2, file, None, tmp_path / "plain")
    beside = run_on_ranks(recorded_steps, 2, tiny_qwen2, file, adapter, tmp_path / "beside")
    for found, expected in zip(beside, plain, strict=True):
        assert_equal(found, expected)
        assert expected["grads"][0]
        assert not [name for name in found["held"] if "reward" in name]
    files = beside[0]["files"]
    assert b'"task_type": "CAUSAL_LM"' in files["adapter/adapter_config.json"]
    assert all("reward" not in name and "score" not in name for name in files["adapter/adapter_model.safetensors"])
