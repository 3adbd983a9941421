"""Our step's loss against what TRL 1.16 computes from the same log-probs: its own code, values and gradients.

TRL pads a row a response, the chosen ones above the rejected ones; we lay responses side by side. Both start from one
tensor of the policy's token log-probs, so the gradients can be compared token by token.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from types import SimpleNamespace
from typing import Any

import needs
import numpy as np
import pytest
import torch
from by_hand import PROMPT_TOKENS, of_kinds, pair, responses_of, single, step_loss
from torch import Tensor

from uft_ds.data.example import KINDS, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.objectives.losses import PRESETS
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss, rewards_of
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.objectives.reward_shift import kl_shift, mismatched

trl = needs.package("trl")

PAIRS = [*pair(0, (4, 7)), *pair(1, (9, 2)), *pair(2, (1, 1)), *pair(3, (5, 12))]
"""Four pairs, of 17 and 22 tokens on the two sides."""

LABELLED = [
    single("binary", label, size, first=10 * number)
    for number, (label, size) in enumerate([(1.0, 4), (0.0, 7), (0.0, 2), (1.0, 11), (0.0, 5)])
]
"""Two responses labelled good, three labelled bad; each to a prompt of its own."""


def trainer(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of TRL's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return getattr(importlib.import_module(module), name)


def token_logps(sequences: Seq[Sequence], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of all supervised tokens under policy (with gradient) and reference, in float64: 1 nat apart or so."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(response.num_tokens for response in responses_of(sequences))
    reference_N = -3 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.2
    policy_N = reference_N + torch.randn(size, generator=generator, dtype=torch.float64) * 0.7
    return policy_N.clamp(max=-0.01).requires_grad_(), reference_N


def padded(sequences: Seq[Sequence], logps_N: Tensor) -> Tensor:
    """The log-prob of each row's next token, 0 where it is not of the response: [rows, longest - 1]."""
    parts = logps_N.split([response.num_tokens for response in responses_of(sequences)])
    longest = max(sequence.num_tokens for sequence in sequences)
    rows = [
        torch.cat([part.new_zeros(PROMPT_TOKENS - 1), part, part.new_zeros(longest - PROMPT_TOKENS - len(part))])
        for part in parts
    ]
    return torch.stack(rows)


def padded_inputs(sequences: Seq[Sequence]) -> dict[str, Tensor]:
    """What TRL's collators make of the sequences."""
    longest = max(sequence.num_tokens for sequence in sequences)
    place_L = torch.arange(longest)
    ends = torch.tensor([[sequence.num_tokens] for sequence in sequences])
    attention = (place_L < ends).long()
    return {
        "input_ids": torch.ones(len(sequences), longest, dtype=torch.int64),
        "attention_mask": attention,
        "completion_mask": attention * (place_L >= PROMPT_TOKENS),
    }


def model_giving(*log_probs: Tensor) -> Callable[..., SimpleNamespace]:
    """A model of which each forward gives the next one of these."""
    left = list(log_probs)

    def forward(**_: Any) -> SimpleNamespace:
        found = left.pop(0)
        nothing = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return forward


def fake_trainer(**options: Any) -> SimpleNamespace:
    """What TRL's losses read of a trainer."""
    alone = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {
        "accelerator": alone, "model": SimpleNamespace(training=True), "precompute_ref_logps": True,
        "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**common, **options)


def sums_of(sequences: Seq[Sequence], logps_N: Tensor) -> Tensor:
    batch = micro_batch(sequences)
    return response_logps(logps_N, batch.response_of_N, batch.num_responses)


def sides_of(values_R: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected ones of responses in our order."""
    return values_R[::2], values_R[1::2]


def tokens_of(sequences: Seq[Sequence]) -> Tensor:
    return torch.tensor([float(response.num_tokens) for response in responses_of(sequences)], dtype=torch.float64)


def assert_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], logps_N: Tensor) -> None:
    """Both losses and their gradients by every token's log-prob agree to 1e-5: our rewards are float32."""
    results: list[tuple[float, Tensor]] = []
    for loss_of in (ours, theirs):
        logps_N.grad = None
        loss = loss_of(logps_N)
        loss.backward()
        assert logps_N.grad is not None
        results.append((loss.item(), logps_N.grad.clone()))
    (our_loss, our_grad), (their_loss, their_grad) = results
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    assert their_grad.abs().max() > 1e-4, "a flat loss proves nothing"
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-6 * float(their_grad.abs().max()))


def test_the_version_is_the_one_that_was_read() -> None:
    """What follows knows TRL 1.16's inner names."""
    assert trl.__version__.startswith("1.16")


# ---- DPOTrainer


def dpo_trainer_loss(
    monkeypatch: pytest.MonkeyPatch, weights: Mapping[str, float], logps_N: Tensor, reference_N: Tensor, beta: float
) -> Tensor:
    """TRL's loss of PAIRS, a weighted sum."""
    rows = [*PAIRS[::2], *PAIRS[1::2]]
    order = [*range(0, len(PAIRS), 2), *range(1, len(PAIRS), 2)]
    parts = logps_N.split([response.num_tokens for response in responses_of(PAIRS)])
    chosen_R, rejected_R = sides_of(sums_of(PAIRS, reference_N))
    inputs = padded_inputs(rows) | {"ref_chosen_logps": chosen_R, "ref_rejected_logps": rejected_R}
    model = model_giving(padded(rows, torch.cat([parts[i] for i in order])))
    fake = fake_trainer(
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, beta=beta, label_smoothing=0.2,
        loss_types=list(weights), loss_weights=list(weights.values()),
    )  # fmt: skip
    loss = trainer("trl", "DPOTrainer", monkeypatch)._compute_loss(fake, model, inputs, False)
    assert isinstance(loss, Tensor)
    return loss


SMOOTHED = PairConstants(label_smoothing=0.2)

DPO_CASES: list[tuple[dict[str, float], dict[str, float], dict[str, Any]]] = [
    ({"sigmoid": 1.0}, {"dpo": 1.0}, {}),
    ({"hinge": 1.0}, {"hinge": 1.0}, {}),
    ({"ipo": 1.0}, {"ipo": 1.0}, {}),
    ({"robust": 1.0}, {"robust": 1.0}, {}),
    ({"sigmoid_norm": 1.0}, {"dpo": 1.0}, {"length_normalized": True}),
    ({"sft": 1.0}, {"nll": 1.0}, {}),
    # TRL adds the two sides of a pair, we take the mean over responses: half as much.
    ({"bco_pair": 1.0}, {"bce": 2.0}, {}),
    ({"apo_zero": 1.0}, {"l1": 2.0}, {}),
    # Sums: MPO (2411.10442) with TRL's weights, and DPO with likelihood.
    ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"dpo": 0.8, "bce": 0.4, "nll": 1.0}, {}),
    ({"sigmoid": 1.0, "sft": 0.2}, {"dpo": 1.0, "nll": 0.2}, {}),
    ({"sigmoid": 0.5, "hinge": 2.0, "robust": 0.25}, {"robust": 0.25, "hinge": 2.0, "dpo": 0.5}, {}),
    ({"ipo": 0.5, "sft": 1.0}, {"ipo": 0.5, "nll": 1.0}, {}),
]


@pytest.mark.parametrize(("theirs", "ours", "shared"), DPO_CASES, ids=lambda x: "+".join(x) if x else "")
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_losses_of_trls_dpo_trainer(
    theirs: dict[str, float], ours: dict[str, float], shared: dict[str, Any], beta: float, monkeypatch: Any
) -> None:
    """Our names and weights give the loss and the gradient of TRL's."""
    logps_N, reference_N = token_logps(PAIRS)
    objective = of_kinds({"pair": ours}, beta=beta, constants=SMOOTHED, **shared)
    assert_same(
        lambda x: step_loss(objective, PAIRS, x, reference_N)[0],
        lambda x: dpo_trainer_loss(monkeypatch, theirs, x, reference_N, beta),
        logps_N,
    )


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_raw_is_trls_sppo_hard(beta: float, monkeypatch: Any) -> None:
    """TRL's is that of log-ratios, ours of rewards: 1 / beta^2 between them, and a sum of two sides."""
    logps_N, reference_N = token_logps(PAIRS)
    objective = of_kinds({"pair": {"raw": 2.0 / beta**2}}, beta=beta)
    assert_same(
        lambda x: step_loss(objective, PAIRS, x, reference_N)[0],
        lambda x: dpo_trainer_loss(monkeypatch, {"sppo_hard": 1.0}, x, reference_N, beta),
        logps_N,
    )


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "cdpo"), ("ipo", "dpo"), ("bco_pair", "mse")])
def test_the_comparison_can_fail(theirs: str, ours: str, monkeypatch: Any) -> None:
    """Two different losses are told apart."""
    logps_N, reference_N = token_logps(PAIRS)
    objective = of_kinds({"pair": {ours: 1.0}}, constants=SMOOTHED)
    with pytest.raises(AssertionError):
        assert_same(
            lambda x: step_loss(objective, PAIRS, x, reference_N)[0],
            lambda x: dpo_trainer_loss(monkeypatch, {theirs: 1.0}, x, reference_N, 0.1),
            logps_N,
        )


# ---- KTOTrainer

BETA = 0.1


def mismatched_labelled() -> tuple[Sequence, ...]:
    found = mismatched([(sequence, sequence.responses[0]) for sequence in LABELLED])
    assert len(found) == len(LABELLED)
    return found


def kto_trainer_loss(
    monkeypatch: pytest.MonkeyPatch,
    logps_N: Tensor,
    reference_N: Tensor,
    mismatched_logps: tuple[Tensor, Tensor] | None,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    """TRL's loss of LABELLED: KTO with the log-probs of mismatched responses, APO-zero without."""
    kto = trainer("trl", "KTOTrainer", monkeypatch)
    labels = torch.tensor([response.score == 1.0 for response in responses_of(LABELLED)])
    inputs = padded_inputs(LABELLED) | {"label": labels, "ref_logps": sums_of(LABELLED, reference_N)}
    forwards = [padded(LABELLED, logps_N)]
    if mismatched_logps is not None:
        others = mismatched_labelled()
        policy_N, other_reference_N = mismatched_logps
        inputs |= {f"KL_{name}": value for name, value in padded_inputs(others).items()}
        inputs["ref_KL_logps"] = sums_of(others, other_reference_N)
        forwards.insert(0, padded(others, policy_N))
    fake = fake_trainer(
        calculate_KL=mismatched_logps is not None,
        loss_type="apo_zero_unpaired" if mismatched_logps is None else "kto",
        beta=BETA, desirable_weight=desirable, undesirable_weight=undesirable,
    )  # fmt: skip
    fake._compute_kl_logps = partial(kto._compute_kl_logps, fake)
    loss = kto._compute_loss(fake, model_giving(*forwards), inputs, False)
    assert isinstance(loss, Tensor)
    return loss


def labelled_objective(desirable: float = 1.0, undesirable: float = 1.0) -> Objective:
    """l1: TRL's two weights as one of the kind, and one of what is labelled bad against it."""
    of = KindObjective({"l1": 1.0}, weight=desirable, beta=BETA)
    return Objective(dict.fromkeys(KINDS, of), undesirable_weight=undesirable / desirable)


@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.0, 0.4), (1.5, 1.0)])
def test_l1_of_labels_is_trls_apo_zero_unpaired(desirable: float, undesirable: float, monkeypatch: Any) -> None:
    """|sigmoid(r) - label| is 1 - sigmoid(r) for good ones, sigmoid(r) for bad ones."""
    logps_N, reference_N = token_logps(LABELLED)
    objective = labelled_objective(desirable, undesirable)
    assert_same(
        lambda x: step_loss(objective, LABELLED, x, reference_N)[0],
        lambda x: kto_trainer_loss(monkeypatch, x, reference_N, None, desirable, undesirable),
        logps_N,
    )


@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["above the reference", "below it: clamped"])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.0, 0.4), (1.5, 1.0)])
def test_l1_with_the_kl_shift_is_trls_kto(
    direction: float, desirable: float, undesirable: float, monkeypatch: Any
) -> None:
    """The shift is beta times TRL's kl: the mean log-ratio of mismatched responses, or 0 where that is negative."""
    logps_N, reference_N = token_logps(LABELLED)
    others = mismatched_labelled()
    other_policy_N, other_reference_N = (x.detach() for x in token_logps(others, seed=1))
    other_policy_N = other_reference_N + direction * (other_policy_N - other_reference_N).abs()
    objective = labelled_objective(desirable, undesirable)
    other_R, other_reference_R = sums_of(others, other_policy_N), sums_of(others, other_reference_N)
    shift = kl_shift(rewards_of(objective, micro_batch(others), other_R, other_reference_R).rewards_R.tolist())
    assert (shift > 0.1) == (direction > 0), "the case should be about a shift"
    shifts_R = torch.full((len(LABELLED),), shift)
    assert_same(
        lambda x: step_loss(objective, LABELLED, x, reference_N, shifts_R)[0],
        lambda x: kto_trainer_loss(
            monkeypatch, x, reference_N, (other_policy_N, other_reference_N), desirable, undesirable
        ),
        logps_N,
    )


# ---- CPOTrainer, ORPOTrainer


def cpo_trainer_loss(
    monkeypatch: pytest.MonkeyPatch, values_R: Tensor, *, loss_type: str = "sigmoid", smoothing: float = 0.0
) -> Tensor:
    """TRL's mean loss of pairs, from one value a response."""
    cpo = trainer("trl.experimental.cpo", "CPOTrainer", monkeypatch)
    fake = fake_trainer(alpha=0.0, beta=BETA, loss_type=loss_type, simpo_gamma=0.7, label_smoothing=smoothing)
    losses_P, *_ = cpo.cpo_loss(fake, *sides_of(values_R))
    loss = losses_P.mean()
    assert isinstance(loss, Tensor)
    return loss


def test_cdpo_is_trls_smoothing_of_log_ratios(monkeypatch: Any) -> None:
    """TRL smooths in CPOTrainer: given log-ratios instead of log-probs, it is conservative DPO."""
    logps_N, reference_N = token_logps(PAIRS)
    reference_R = sums_of(PAIRS, reference_N)
    objective = of_kinds({"pair": {"cdpo": 1.0}}, beta=BETA, constants=SMOOTHED)
    assert_same(
        lambda x: step_loss(objective, PAIRS, x, reference_N)[0],
        lambda x: cpo_trainer_loss(monkeypatch, sums_of(PAIRS, x) - reference_R, smoothing=0.2),
        logps_N,
    )


def test_contrast_is_trls_cpo(monkeypatch: Any) -> None:
    """The preference part of CPO, without a reference."""
    logps_N, _ = token_logps(PAIRS)
    objective = of_kinds({"pair": {"contrast": 1.0}}, beta=BETA)
    assert_same(
        lambda x: step_loss(objective, PAIRS, x, None)[0],
        lambda x: cpo_trainer_loss(monkeypatch, sums_of(PAIRS, x)),
        logps_N,
    )


def test_simpo_is_trls(monkeypatch: Any) -> None:
    """TRL is given means over tokens, and divides gamma by beta before it multiplies by beta."""
    logps_N, _ = token_logps(PAIRS)
    objective = of_kinds({"pair": {"simpo": 1.0}}, beta=BETA, constants=PairConstants(simpo_margin=0.7))
    assert_same(
        lambda x: step_loss(objective, PAIRS, x, None)[0],
        lambda x: cpo_trainer_loss(monkeypatch, sums_of(PAIRS, x) / tokens_of(PAIRS), loss_type="simpo"),
        logps_N,
    )


def test_odds_ratio_is_trls_orpo(monkeypatch: Any) -> None:
    """TRL's is beta log sigmoid(log odds), subtracted from the likelihood: ours is weighted by its beta."""
    orpo = trainer("trl.experimental.orpo", "ORPOTrainer", monkeypatch)
    logps_N, _ = token_logps(PAIRS)

    def theirs(logps_N: Tensor) -> Tensor:
        chosen_P, rejected_P = sides_of(sums_of(PAIRS, logps_N) / tokens_of(PAIRS))
        losses_P, *_ = orpo.odds_ratio_loss(fake_trainer(beta=0.25), chosen_P, rejected_P)
        return -losses_P.mean()

    objective = of_kinds({"pair": {"odds_ratio": 0.25}}, beta=BETA)
    assert_same(lambda x: step_loss(objective, PAIRS, x, None)[0], theirs, logps_N)


def test_the_presets_are_trls_sums(monkeypatch: Any) -> None:
    """`cpo` adds the likelihood of TRL's cpo_alpha 1, `orpo` that of its beta 0.1: the mean over chosen tokens."""
    logps_N, reference_N = token_logps(PAIRS)
    orpo = trainer("trl.experimental.orpo", "ORPOTrainer", monkeypatch)

    def their_orpo(logps_N: Tensor) -> Tensor:
        chosen_P, rejected_P = sides_of(sums_of(PAIRS, logps_N) / tokens_of(PAIRS))
        losses_P, *_ = orpo.odds_ratio_loss(fake_trainer(beta=0.1), chosen_P, rejected_P)
        return their_likelihood(logps_N) - losses_P.mean()

    def their_likelihood(logps_N: Tensor) -> Tensor:
        return dpo_trainer_loss(monkeypatch, {"sft": 1.0}, logps_N, reference_N, BETA)

    def their_cpo(logps_N: Tensor) -> Tensor:
        return their_likelihood(logps_N) + cpo_trainer_loss(monkeypatch, sums_of(PAIRS, logps_N))

    for name, theirs in (("cpo", their_cpo), ("orpo", their_orpo)):
        objective = of_kinds({"pair": PRESETS[name]}, beta=BETA)
        assert not objective.needs_reference
        assert_same(lambda x, of=objective: step_loss(of, PAIRS, x, None)[0], theirs, logps_N)  # type: ignore[misc]


@pytest.mark.parametrize("centering", [0.0, 0.05], ids=["plain", "centered"])
@pytest.mark.parametrize("margin", [False, True], ids=["no margin", "margin"])
def test_a_reward_models_loss_is_trls(monkeypatch: Any, margin: bool, centering: float) -> None:
    """RewardTrainer's, from its classifier's logits of all chosen and then all rejected texts."""
    pairs = [*pair(0, (4, 7), (0.9, 0.1)), *pair(1, (9, 2), (0.6, 0.5)), *pair(2, (1, 1), (1.0, 0.3))]
    batch = micro_batch(pairs)
    rewards_R = (torch.randn(len(pairs), generator=torch.Generator().manual_seed(3)) * 2).requires_grad_()
    objective = Objective(
        dict.fromkeys(KINDS, KindObjective({"bradley_terry": 1.0})),
        constants=PairConstants(score_margin=margin, centering=centering),
        reward="head",
    )

    def ours(rewards_R: Tensor) -> Tensor:
        terms = count_terms(objective, batch.responses)
        return micro_batch_loss(objective, batch, terms, {"reward": rewards_R})[0]

    def theirs(rewards_R: Tensor) -> Tensor:
        chosen_P, rejected_P = batch.scores_R[::2], batch.scores_R[1::2]
        inputs = {"attention_mask": torch.ones(len(pairs), 1)} | ({"margin": chosen_P - rejected_P} if margin else {})
        fake = fake_trainer(args=SimpleNamespace(center_rewards_coefficient=centering or None))
        model = lambda **inputs: SimpleNamespace(logits=torch.cat([rewards_R[::2], rewards_R[1::2]])[:, None])  # noqa: E731
        loss = trainer("trl", "RewardTrainer", monkeypatch).compute_loss(fake, model, inputs)
        assert isinstance(loss, Tensor)
        return loss

    assert_same(ours, theirs, rewards_R)


def test_the_padded_rows_hold_every_token_once() -> None:
    """Of the comparison itself: 1, 2, ... of responses of 1 and 3 tokens, behind the prompt's two predictions."""
    sequences = [single("binary", 1.0, 1), single("binary", 0.0, 3)]
    rows = padded(sequences, torch.arange(1.0, 5.0))
    assert rows.tolist() == [[0, 0, 1, 0, 0], [0, 0, 2, 3, 4]]
    mask = padded_inputs(sequences)["completion_mask"]
    np.testing.assert_array_equal(mask[:, 1:].bool().numpy(), (rows != 0).numpy())
