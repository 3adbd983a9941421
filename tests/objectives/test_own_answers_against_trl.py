"""Losses of the policy's own answers against TRL 1.16's RLOOTrainer and GRPOTrainer: their own code, on a fixed batch.

`RLOOTrainer._generate_and_score_completions` makes the batch, its KL penalties and its advantages, and
`RLOOTrainer._compute_loss` the loss, with its ratio to the old policy and its clipping. Stand-ins give what a model, a
generator and a reward function would: the log-probs of tokens, the answers and their scores. `GRPOTrainer`'s method of
the same name gives GRPO's advantages.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import needs
import pytest
import torch
from by_hand import PROMPT_TOKENS, answer, compared_step, of_kinds
from torch import Tensor

from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.implicit_reward import response_logps

trl = needs.package("trl")

GENERATIONS = 3
SEQUENCES = [
    *(answer(score, *range(5, 5 + size), prompt=1) for score, size in ((0.9, 4), (0.1, 7), (0.3, 1))),
    *(answer(score, *range(5, 5 + size), prompt=2) for score, size in ((0.0, 5), (1.0, 2), (0.6, 3))),
]
"""Two prompts, three answers to each, of one token to seven."""
LENGTHS = [sequence.responses[0].num_tokens for sequence in SEQUENCES]
SCORES = torch.tensor([[sequence.responses[0].score] for sequence in SEQUENCES])


def token_logps() -> tuple[Tensor, Tensor]:
    """Of all answers' tokens, in order, under policy (with gradient) and reference, in float64."""
    generator = torch.Generator().manual_seed(0)
    reference_N = -3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) - 0.2
    policy_N = reference_N + torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64) * 0.7
    return policy_N.requires_grad_(), reference_N


def padded(logps_N: Tensor) -> Tensor:
    """A row an answer, as TRL has them. What is behind an answer's end must play no part: it is -100."""
    rows = [torch.cat([part, part.new_full((max(LENGTHS) - len(part),), -100.0)]) for part in logps_N.split(LENGTHS)]
    return torch.stack(rows)


def fake_trainer(logps_of: dict[str, Tensor], beta: float) -> Any:
    """What TRL's methods read of a trainer. logps_of: by model, a row an answer."""
    prompts = [sequence.token_ids_T[:PROMPT_TOKENS].tolist() for sequence in SEQUENCES]
    completions = [sequence.token_ids_T[PROMPT_TOKENS:].tolist() for sequence in SEQUENCES]

    def logps(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        found = logps_of[model.name]
        return found, torch.zeros_like(found), None

    alone = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    policy, reference = (
        SimpleNamespace(name=name, training=True, is_gradient_checkpointing=False) for name in ("policy", "reference")
    )
    logs: dict[str, Any] = {name: [] for name in ("prompt", "completion", "advantages", "images")}
    return SimpleNamespace(
        _generate=lambda texts: (prompts, completions, ["answer"] * len(SEQUENCES)),
        accelerator=alone, model=policy, ref_model=reference, beta=beta, num_generations=GENERATIONS,
        _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=len(SEQUENCES), gradient_checkpointing_kwargs=None, steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        num_iterations=1, use_vllm=False, _get_per_token_logps_and_entropies=logps,
        _calculate_rewards=lambda *_: SCORES.clone(), reward_weights=torch.ones(1), reward_clip_range=None,
        reward_func_names=["score"], reward_funcs=[None], normalize_advantages=False, log_multimodal=False,
        _metrics={"train": defaultdict(list)}, _pending_extra_logs={}, _pending_metrics={},
        _logs=logs | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False,
        # of GRPOTrainer alone
        environment_factories=None, environments=None, tools=None, _is_vlm=False,
        multi_objective_aggregation="sum_then_normalize", scale_rewards="group",
    )  # fmt: skip


def without_processes(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> Any:
    """A class of TRL's, in whose module one process gathers from itself."""
    of_trl = importlib.import_module(module)
    monkeypatch.setattr(of_trl, "gather", lambda x: x)
    monkeypatch.setattr(of_trl, "gather_object", lambda x: x)
    return getattr(of_trl, name)


def rloo_trainer(
    monkeypatch: pytest.MonkeyPatch, logps_N: Tensor, reference_N: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """TRL's advantages and its loss."""
    rloo = without_processes(monkeypatch, "trl.trainer.rloo_trainer", "RLOOTrainer")
    fake = fake_trainer({"policy": padded(logps_N), "reference": padded(reference_N)}, beta)
    inputs = rloo._generate_and_score_completions(fake, [{"prompt": "question"}] * len(SEQUENCES))
    return inputs["advantages"], rloo._compute_loss(fake, fake.model, inputs)


def sums(logps_N: Tensor) -> Tensor:
    batch = micro_batch(SEQUENCES)
    return response_logps(logps_N, batch.response_of_N, batch.num_responses)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_rloo_is_trls(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advantages of all answers, and the gradient by every token's log-prob, to float32's rounding.

    TRL's loss is that of a ratio, which is 1 here, so its value is the mean advantage, 0; ours is that of a logarithm.
    """
    assert trl.__version__.startswith("1.16"), "what is above knows its inner names"
    logps_N, reference_N = token_logps()
    advantages, loss = rloo_trainer(monkeypatch, logps_N, reference_N, beta)
    loss.backward()
    assert logps_N.grad is not None
    theirs, logps_N.grad = logps_N.grad.clone(), None
    found = compared_step(of_kinds({"score": {"rloo": 1.0}}, beta=beta), SEQUENCES, sums(logps_N), sums(reference_N))
    found.loss.backward()
    assert found.advantages == pytest.approx(advantages.tolist(), abs=1e-6)
    assert advantages.abs().min() > 1e-3
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(logps_N.grad, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("other", ["reinforce", "grpo"])
def test_the_comparison_can_fail(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another loss has other advantages."""
    logps_N, reference_N = token_logps()
    advantages, _ = rloo_trainer(monkeypatch, logps_N, reference_N, 0.05)
    found = compared_step(of_kinds({"score": {other: 1.0}}, beta=0.05), SEQUENCES, sums(logps_N), sums(reference_N))
    assert found.advantages != pytest.approx(advantages.tolist(), abs=1e-2)


def test_grpos_advantage_of_scores_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a KL, which TRL adds to the loss and not to the reward: at log-ratios of 0 ours has none either."""
    grpo = without_processes(monkeypatch, "trl.trainer.grpo_trainer", "GRPOTrainer")
    _, reference_N = token_logps()
    fake = fake_trainer({"policy": padded(reference_N)}, beta=0.0)
    prompts, completions, texts = fake._generate(None)
    fake._generate = lambda texts_: (prompts, completions, None, texts, None, {}, None, None)
    inputs = grpo._generate_and_score_completions(fake, [{"prompt": "question"}] * len(SEQUENCES))
    found = compared_step(of_kinds({"score": {"grpo": 1.0}}), SEQUENCES, sums(reference_N), sums(reference_N))
    assert found.advantages == pytest.approx(inputs["advantages"].tolist(), abs=1e-6)
    assert max(found.advantages) > 1.0
