"""A step's loss against its shares, and what kinds, pairs, weights, lengths and schedules do to it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from by_hand import log_logistic, logistic, of_kinds, pair, responses_of, share, single, step_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import objective, toy_sequences

from uft_ds.data.example import KINDS, Kind, Response, Sequence, Unit
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.objectives.losses import (
    LIKELIHOOD,
    LOSSES,
    NEEDS_REFERENCE,
    OF_HEAD,
    PAIRWISE,
    POINTWISE,
    POLICY_GRADIENT,
    PRESETS,
    REFERENCE_FREE,
    TERMS,
    expanded,
)
from uft_ds.objectives.objective import BetaSchedule, KindObjective, Objective, count_terms, objective_at, rewards_of
from uft_ds.objectives.pairwise import PairConstants

BETA = 0.1


def mixed(pair_losses: dict[str, float]) -> Objective:
    """A loss, a weight and a beta of its own for each kind."""
    return Objective(
        {
            "instruction": KindObjective({"nll": 1.0}, weight=0.5, beta=0.3),
            "score": KindObjective({"mse": 1.0}, weight=2.0, beta=0.2),
            "binary": KindObjective({"bce": 1.0}, weight=1.5, beta=0.05),
            "pair": KindObjective(pair_losses, weight=3.0, beta=0.1),
        },
        undesirable_weight=0.7,
    )


OBJECTIVES = {
    **{loss: objective(loss, BETA) for loss in ("mse", "bce", "l1", "raw", "nll", "nll_sum")},
    "dpo and nll": mixed({"dpo": 1.0, "nll": 0.2}),
    "pairs by mse": mixed({"mse": 1.0}),
    "many of pairs": mixed({"hinge": 0.5, "contrast": 1.0, "odds_ratio": 0.1, "bce": 1.0, "nll_sum": 0.01}),
    "pairs a token": mixed({"ipo": 0.5, "simpo": 1.0, "nll": 1.0}),
    "a token": objective("l1", 2.0, length_normalized=True),
}


# ---- a step and its shares


def units_of_all_kinds() -> list[Unit]:
    """Five conversations of 1 to 3 responses, four of them labelled or scored, and three pairs."""
    conversations, number = [], 0
    for sequence in toy_sequences(5):
        responses = []
        for response in sequence.responses:
            kind, score = KINDS[number % 3], round(response.score) if number % 3 == 2 else response.score
            responses.append(Response(response.start, response.end, score, kind, response.origin))
            number += 1
        conversations.append((Sequence(sequence.token_ids_T, tuple(responses)),))
    return [*conversations, *(tuple(pair(n, (n + 1, 9 - n), (0.9, 0.1 * n))) for n in range(3))]


UNITS = units_of_all_kinds()


def log_probs(units: list[Unit]) -> tuple[list[Tensor], list[Tensor]]:
    """Random log-probs of policy (with gradient) and reference, for each unit's supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = [sum(response.num_tokens for response in responses_of(unit)) for unit in units]
    policy = [(-torch.rand(size, generator=generator) * 5).requires_grad_() for size in sizes]
    return policy, [-torch.rand(size, generator=generator) * 5 for size in sizes]


def total(uft: Objective, groups: list[list[int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, sums and gradients of a step whose micro-batches hold the units of `groups`; shifts by the score."""
    policy, reference = log_probs(UNITS)
    terms = count_terms(uft, [response for unit in UNITS for response in responses_of(unit)])
    loss_sum = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64)
    for group in groups:
        batch = micro_batch([sequence for i in group for sequence in UNITS[i]])
        logps_N = torch.cat([policy[i] for i in group]) if group else torch.zeros(0, requires_grad=True)
        reference_N = torch.cat([reference[i] for i in group]) if group else torch.zeros(0)
        loss, parts = share(uft, batch, terms, logps_N, reference_N, shifts_R=batch.scores_R / 3)
        loss.backward()
        loss_sum += loss.detach()
        sums += parts
    return loss_sum, sums, [logps.grad for logps in policy if logps.grad is not None]


@pytest.mark.parametrize("name", OBJECTIVES)
@given(cuts=st.lists(st.integers(0, 8), max_size=5), order=st.permutations(range(8)))
@settings(max_examples=15, deadline=None)
def test_any_split_into_micro_batches_adds_up_to_the_whole(name: str, cuts: list[int], order: list[int]) -> None:
    """Invariant 2 in small: values, gradients and sums do not depend on the split, its order, or empty parts."""
    uft = OBJECTIVES[name]
    groups = [order[a:b] for a, b in pairwise([0, *sorted(cuts), 8])]
    whole_loss, whole_sums, whole_grads = total(uft, [list(range(8))])
    loss_sum, sums, grads = total(uft, groups)
    torch.testing.assert_close(loss_sum, whole_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-6, atol=1e-6)
    assert len(grads) == 8
    for grad, whole in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, whole, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_made_of_the_sums(name: str) -> None:
    """Without `undesirable_weight`: the kinds' sums, times their weights, over the numbers of all kinds together.

    The numbers of the shares are those that were counted before the first of them.
    """
    uft = Objective(OBJECTIVES[name].of_kind, length_normalized=OBJECTIVES[name].length_normalized)
    loss, sums, _ = total(uft, [list(range(8))])
    terms = count_terms(uft, [response for unit in UNITS for response in responses_of(unit)])
    weights = torch.tensor(
        [[uft.of_kind[kind].weight * uft.of_kind[kind].losses.get(loss, 0.0) for loss in LOSSES] for kind in KINDS]
    )
    numbers = sums[1].sum(dim=0)
    assert {loss: int(numbers[LOSSES.index(loss)]) for loss in uft.losses} == terms
    expected = ((weights * sums[0]).sum(dim=0) / numbers.clamp(min=1)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("uft", [objective("mse"), objective("nll"), mixed({"dpo": 1.0, "nll": 0.2})])
def test_an_empty_micro_batch_has_a_zero_loss_with_a_graph(uft: Objective) -> None:
    """A rank with nothing left must still walk back: loss 0, gradient 0 (not None), sums 0."""
    below = torch.randn(3, requires_grad=True)
    logps_N = below[torch.zeros(0, dtype=torch.int64)]
    loss, sums = share(uft, micro_batch([]), count_terms(uft, []), logps_N, torch.zeros(0))
    assert loss.shape == ()
    assert loss.item() == 0.0
    loss.backward()
    assert below.grad is not None
    assert below.grad.tolist() == [0.0, 0.0, 0.0]
    assert not sums.any()
    assert sums.shape == (2, len(KINDS), len(LOSSES))


# ---- kinds, weights, betas


def two_responses(kinds: tuple[Kind, Kind] = ("instruction", "score")) -> MicroBatch:
    """Two responses of 2 and 3 tokens with scores 1.0 and 0.25."""
    responses = (Response(1, 3, 1.0, kinds[0], "a:1"), Response(4, 7, 0.25, kinds[1], "a:2"))
    return micro_batch([Sequence(np.arange(7, dtype=np.int32), responses)])


def test_kinds_have_their_own_loss_weight_and_count() -> None:
    """By hand: nll over 10 tokens of the step with weight 0.5, mse over 4 responses with weight 2.

    nll: 0.5 (1 + 2) / 10 = 0.15; log-ratio of the other 3 - 3 = 0: 2 (0.5 - 0.25)^2 / 4 = 0.03125.
    """
    uft = mixed({"dpo": 1.0})
    logps_N = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0], requires_grad=True)
    reference_N = torch.tensor([-7.0, -7.0, -1.0, -1.0, -1.0])
    loss, sums = share(uft, two_responses(), {"nll": 10, "mse": 4}, logps_N, reference_N)
    assert loss.item() == pytest.approx(0.15 + 0.03125, rel=1e-6)
    loss.backward()
    # mse: 2 / 4 x 2 (0.5 - 0.25) x 0.25 x beta 0.2
    assert logps_N.grad is not None
    assert logps_N.grad.tolist() == pytest.approx([-0.05, -0.05, *[0.0625 * 0.2] * 3])
    nll, mse = sums[:, :, LOSSES.index("nll")], sums[:, :, LOSSES.index("mse")]
    assert nll.tolist() == [[3.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]], "sums are without weights"
    assert mse.tolist() == [[0.0, 0.0625, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    assert sums.dtype == torch.float64
    assert not sums.requires_grad


def test_each_kind_has_its_own_beta() -> None:
    """10 nats above the reference everywhere: rewards of 3, 2, 0.5 and 1, the log-ratios 10."""
    batch = micro_batch([single(kind, 1.0, 2) for kind in KINDS])
    found = rewards_of(mixed({"dpo": 1.0}), batch, torch.full((4,), -5.0).double(), torch.full((4,), -15.0).double())
    assert found.rewards_R.tolist() == pytest.approx([3.0, 2.0, 0.5, 1.0])
    assert found.log_ratios_R.tolist() == [10.0] * 4


def test_kinds_under_one_loss_share_its_number() -> None:
    """Two kinds under mse at the start: ((0.5 - 1)^2 + 3 (0.5 - 0)^2) / 2 = 0.5, as one data set with weights."""
    uft = Objective(
        {**dict.fromkeys(KINDS, KindObjective({"mse": 1.0})), "score": KindObjective({"mse": 1.0}, weight=3.0)}
    )
    sequences = [single("instruction", 1.0, 2), single("score", 0.0, 5)]
    logps_N = torch.zeros(7, requires_grad=True)
    assert step_loss(uft, sequences, logps_N, torch.zeros(7))[0].item() == 0.5


def test_a_sum_of_losses_is_the_sum_of_its_parts() -> None:
    """{dpo: 0.8, bce: 0.2, nll: 1} of two pairs: each part over its own number, 2 pairs, 4 responses, 6 tokens."""
    sequences = [*pair(0, (2, 3)), *pair(1, (4, 1))]
    generator = torch.Generator().manual_seed(3)
    logps_N, reference_N = (-torch.rand(10, generator=generator) * 4 for _ in range(2))
    weights = {"dpo": 0.8, "bce": 0.2, "nll": 1.0}
    whole, _ = step_loss(of_kinds({"pair": weights}), sequences, logps_N, reference_N)
    parts = {
        name: step_loss(of_kinds({"pair": {name: 1.0}}), sequences, logps_N, reference_N)[0].item() for name in weights
    }
    assert whole.item() == pytest.approx(sum(weights[name] * value for name, value in parts.items()), rel=1e-6)
    chosen = [*range(2), *range(5, 9)]
    assert parts["nll"] == pytest.approx(-float(logps_N[chosen].mean()), rel=1e-6)
    sums = torch.stack([part.sum() for part in (logps_N - reference_N).double().split([2, 3, 4, 1])]).tolist()
    margins = [BETA * (sums[0] - sums[1]), BETA * (sums[2] - sums[3])]
    assert parts["dpo"] == pytest.approx(-sum(map(log_logistic, margins)) / 2, rel=1e-6)
    signed = [BETA * sum_ * (1 if place % 2 == 0 else -1) for place, sum_ in enumerate(sums)]
    assert parts["bce"] == pytest.approx(-sum(map(log_logistic, signed)) / 4, rel=1e-6)


# ---- terms


def test_terms_are_responses_pairs_or_tokens() -> None:
    """Instruction 2 tokens; score 3; binary good 4, bad 5; a pair of 6 and 7.

    nll: 2 + 4 + 6 tokens, neither the bad label's nor the rejected side's; mse 1 and bce 2 responses; dpo 1 pair; l1
    its 2 sides.
    """
    uft = of_kinds(
        {
            "instruction": {"nll": 1.0},
            "score": {"mse": 1.0},
            "binary": {"bce": 1.0, "nll": 1.0},
            "pair": {"dpo": 1.0, "nll": 1.0, "l1": 1.0},
        }
    )
    sequences = [single("instruction", 1.0, 2), single("score", 0.1, 3), single("binary", 1.0, 4)]
    sequences += [single("binary", 0.0, 5), *pair(7, (6, 7))]
    assert count_terms(uft, responses_of(sequences)) == {"mse": 1, "bce": 2, "l1": 2, "dpo": 1, "nll": 12}
    assert count_terms(uft, []) == {"mse": 0, "bce": 0, "l1": 0, "dpo": 0, "nll": 0}
    assert count_terms(objective("bce"), responses_of(sequences)) == {"bce": 6}
    assert count_terms(objective("nll_sum"), responses_of(sequences)) == {"nll_sum": 4}


@pytest.mark.parametrize(("loss", "number"), [("nll", 2 + 3 + 4), ("nll_sum", 3)])
def test_what_was_rejected_or_labelled_bad_is_never_imitated(loss: str, number: int) -> None:
    """Score 0 of 2 tokens, binary good 3 and bad 5, a pair of 4 and 6: slopes of -1 / 9 a token, or -1 / 3.

    A low score is no label: it is imitated, if the recipe says so.
    """
    sequences = [single("score", 0.0, 2), single("binary", 1.0, 3), single("binary", 0.0, 5), *pair(1, (4, 6))]
    logps_N = torch.zeros(20, requires_grad=True)
    loss_share, sums = step_loss(objective(loss), sequences, logps_N, None)
    loss_share.backward()
    assert logps_N.grad is not None
    imitated = [1] * 5 + [0] * 5 + [1] * 4 + [0] * 6
    assert logps_N.grad.tolist() == pytest.approx([-one / number for one in imitated])
    assert sums[1, :, LOSSES.index(loss)].sum() == number


def test_the_chosen_side_of_a_pair_is_the_first() -> None:
    """Margin 5 nats at beta 0.1, and not -5: -log sigmoid(0.5) = 0.4741, from tokens anywhere in the micro-batch.

    The scored responses between the pairs have the weight 0.
    """
    sequences = [single("score", 0.3, 4), *pair(5, (1, 2)), single("score", 0.3, 1), *pair(2, (3, 1))]
    logps_N = torch.tensor([-9.0] * 4 + [-1.0] + [-3.0, -3.0] + [-9.0] + [-1.0] * 3 + [-8.0], requires_grad=True)
    loss, sums = step_loss(of_kinds({"pair": {"dpo": 1.0}, "score": {"mse": 0.0}}), sequences, logps_N, torch.zeros(12))
    assert loss.item() == pytest.approx(-log_logistic(0.5), rel=1e-6)
    assert sums[:, KINDS.index("pair"), LOSSES.index("dpo")].tolist() == pytest.approx([-2 * log_logistic(0.5), 2.0])
    loss.backward()
    assert logps_N.grad is not None
    slope = BETA * logistic(-0.5) / 2
    expected = [0] * 4 + [-slope] + [slope] * 2 + [0] + [-slope] * 3 + [slope]
    assert logps_N.grad.tolist() == pytest.approx(expected)


def test_a_loss_of_pairs_takes_only_the_kinds_that_name_it() -> None:
    """dpo of another kind has no terms, though there are pairs: those are under mse, (0.5^2 + 0.5^2) / 2."""
    uft = of_kinds({"instruction": {"dpo": 1.0}, "pair": {"mse": 1.0}})
    sequences = [single("instruction", 1.0, 2), *pair(0, (2, 3))]
    assert count_terms(uft, responses_of(sequences))["dpo"] == 0
    loss, sums = step_loss(uft, sequences, torch.zeros(7), torch.zeros(7))
    assert loss.item() == 0.25
    assert not sums[:, :, LOSSES.index("dpo")].any()


# ---- the table


def test_every_loss_is_of_one_family() -> None:
    """4 of one response, 9, 3 and 1 of pairs, 2 likelihoods, 3 of own answers make 22 names, in this order."""
    assert (*POINTWISE, *PAIRWISE, *REFERENCE_FREE, *OF_HEAD, *LIKELIHOOD, *POLICY_GRADIENT) == LOSSES
    assert len(set(LOSSES)) == 22
    assert {name: TERMS[name] for name in ("mse", "dpo", "simpo", "nll", "nll_sum")} == {
        "mse": "response",
        "dpo": "pair",
        "simpo": "pair",
        "nll": "token",
        "nll_sum": "response",
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_compare_with_the_reference_need_it(loss: str) -> None:
    """Likelihood, SimPO, CPO and ORPO run without one, and so does a head's loss: no reference is computed where no
    kind's loss needs it."""
    free = ("nll", "nll_sum", "simpo", "contrast", "odds_ratio", *OF_HEAD)
    assert (loss in NEEDS_REFERENCE) == (loss not in free)
    assert objective(loss).needs_reference == (loss not in free)
    assert of_kinds({"pair": {loss: 0.1, "nll": 1.0}}).needs_reference == (loss not in free)
    if loss in free and loss not in OF_HEAD:  # it has no log-probs
        step_loss(objective(loss), pair(0), torch.full((5,), -1.0), None)


def test_supervised_fine_tuning_runs_without_a_reference() -> None:
    """The mean over tokens, (1 + 2 + 3 + 4 + 5) / 5 = 3."""
    uft, batch = objective("nll"), two_responses()
    logps_N = -torch.arange(1.0, 6.0)
    loss, sums = share(uft, batch, count_terms(uft, batch.responses), logps_N, None)
    assert loss.item() == pytest.approx(3.0)
    assert sums[:, :, LOSSES.index("nll")].tolist() == [[3.0, 12.0, 0.0, 0.0], [2.0, 3.0, 0.0, 0.0]]


def test_uft_eq_1_sums_over_tokens() -> None:
    """nll_sum: (1 + 2) and (3 + 4 + 5) nats, the mean over 2 responses 7.5."""
    uft, batch = objective("nll_sum"), two_responses()
    loss, _ = share(uft, batch, count_terms(uft, batch.responses), -torch.arange(1.0, 6.0), None)
    assert loss.item() == pytest.approx(7.5)


def test_presets_are_sums_of_the_table() -> None:
    """ORPO's lambda 0.1 and CPO's likelihood of weight 1; other names stand for themselves, and sums stay."""
    assert expanded("orpo") == {"nll": 1.0, "odds_ratio": 0.1}
    assert expanded("cpo") == {"nll": 1.0, "contrast": 1.0}
    assert expanded("dpo") == {"dpo": 1.0}
    assert expanded({"dpo": 1.0, "nll": 0.2}) == {"dpo": 1.0, "nll": 0.2}
    assert all(set(losses) <= set(LOSSES) and name not in LOSSES for name, losses in PRESETS.items())


def test_losses_in_use_are_named_in_the_tables_order() -> None:
    """Whatever kind uses them, each once; pointwise ones are those that the shift moves."""
    uft = mixed({"nll": 0.2, "dpo": 1.0, "mse": 1.0})
    assert uft.losses == ("mse", "bce", "dpo", "nll")
    assert [kind for kind in KINDS if uft.has_pointwise(kind)] == ["score", "binary", "pair"]
    assert not mixed({"dpo": 1.0}).has_pointwise("pair")


# ---- lengths, labels, shifts


def test_lengths_normalised_means_a_token() -> None:
    """6 nats on 3 tokens at beta 0.5: a reward of 1, not 3; the log-ratio is reported as the sum."""
    batch = micro_batch([single("score", 0.25, 3)])
    logps_R, reference_R = torch.tensor([-4.0]).double(), torch.tensor([-10.0]).double()
    summed = rewards_of(objective("mse", 0.5), batch, logps_R, reference_R)
    a_token = rewards_of(objective("mse", 0.5, length_normalized=True), batch, logps_R, reference_R)
    assert (summed.rewards_R.item(), a_token.rewards_R.item()) == (3.0, 1.0)
    assert summed.log_ratios_R.item() == a_token.log_ratios_R.item() == 6.0


@pytest.mark.parametrize(("loss", "reward"), [("ipo", 1.0), ("simpo", 1.0), ("dpo", 3.0), ("odds_ratio", 3.0)])
def test_rewards_have_the_unit_of_their_kinds_losses(loss: str, reward: float) -> None:
    """6 nats on 3 tokens at beta 0.5: 1 for a kind under ipo or simpo, whose beta is per nat a token, else 3."""
    uft = of_kinds({"pair": {loss: 1.0, "nll": 1.0}}, beta=0.5)
    batch = micro_batch([single("pair", 1.0, 3), single("score", 1.0, 3)])
    logps_R, reference_R = torch.tensor([-4.0, -4.0]).double(), torch.tensor([-10.0, -10.0]).double()
    assert rewards_of(uft, batch, logps_R, reference_R).rewards_R.tolist() == [reward, 3.0]


def test_pairs_by_lengths_normalised() -> None:
    """6 nats on 3 tokens and 2 on 4 at beta 2: DPO of D = 2 (2 - 1/2) = 3."""
    logps_N = torch.cat([torch.full((3,), -1.0), torch.full((4,), -1.0)])
    reference_N = torch.cat([torch.full((3,), -3.0), torch.full((4,), -1.5)])
    uft = of_kinds({"pair": {"dpo": 1.0}}, beta=2.0, length_normalized=True)
    assert step_loss(uft, pair(0, (3, 4)), logps_N, reference_N)[0].item() == pytest.approx(-log_logistic(3.0))


@pytest.mark.parametrize("loss", ["ipo", "simpo", "odds_ratio", "contrast"])
def test_losses_with_lengths_of_their_own_stay_as_they_are(loss: str) -> None:
    """ipo, simpo and odds_ratio compare means over tokens anyway, contrast sums: the option does not touch them."""
    logps_N, reference_N = -torch.arange(1.0, 8.0), -torch.arange(7.0, 0.0, -1.0)
    found = [
        step_loss(of_kinds({"pair": {loss: 1.0}}, length_normalized=normalized), pair(0, (3, 4)), logps_N, reference_N)[
            0
        ].item()
        for normalized in (False, True)
    ]
    assert found[0] == found[1]


def test_the_weight_of_bad_labels() -> None:
    """l1 at the start is 1/2 each: (0.5 + 0.4 0.5) / 2 = 0.35 of labels; other kinds' zeros are not labels."""
    uft = objective("l1", undesirable_weight=0.4)
    for kind, expected in (("binary", 0.35), ("score", 0.5), ("pair", 0.5)):
        sequences = [single(kind, 1.0, 2), single(kind, 0.0, 2)]  # type: ignore[arg-type]
        loss, sums = step_loss(uft, sequences, torch.zeros(4), torch.zeros(4))
        assert loss.item() == pytest.approx(expected)
        assert sums[:, KINDS.index(kind), LOSSES.index("l1")].tolist() == [1.0, 2.0], "sums are without weights"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_shift_moves_scores_and_nothing_else(loss: str) -> None:
    """A shift of 0.5 is 5 nats at beta 0.1, for pointwise losses; pairs and likelihoods do not know it."""
    sequences = pair(0, (2, 3))
    logps_N, reference_N = torch.full((5,), -1.0), torch.tensor([-2.0, -1.5, -1.0, -0.5, -1.5])
    moved = reference_N + torch.tensor([2.5, 2.5, 5 / 3, 5 / 3, 5 / 3])
    uft = objective(loss, BETA)
    plain = step_loss(uft, sequences, logps_N, reference_N)[0].item()
    shifted = step_loss(uft, sequences, logps_N, reference_N, torch.full((2,), 0.5))[0].item()
    assert (shifted != plain) == (loss in POINTWISE)
    if loss in POINTWISE:
        assert shifted == pytest.approx(step_loss(uft, sequences, logps_N, moved)[0].item(), rel=1e-5)


# ---- betas over a run


@pytest.mark.parametrize(
    ("shape", "progress", "factor"),
    [
        *[("constant", progress, 1.0) for progress in (0.0, 0.5, 1.0)],
        ("linear", 0.0, 1.0), ("linear", 0.25, 0.8), ("linear", 0.5, 0.6), ("linear", 1.0, 0.2),
        ("cosine", 0.0, 1.0), ("cosine", 0.25, 1 - 0.8 * (1 - math.sqrt(0.5)) / 2), ("cosine", 0.5, 0.6),
        ("cosine", 1.0, 0.2),
    ],
)  # fmt: skip
def test_betas_move_to_their_end(shape: BetaSchedule, progress: float, factor: float) -> None:
    """beta_end 0.2: all kinds' betas times 1 at the start, 0.6 half way, 0.2 at the last step; nothing else moves."""
    before = mixed({"dpo": 1.0})
    uft = Objective(before.of_kind, undesirable_weight=0.7, beta_schedule=shape, beta_end=0.2)
    found = objective_at(uft, progress)
    for kind in KINDS:
        assert found.of_kind[kind].beta == pytest.approx(before.of_kind[kind].beta * factor)
        assert found.of_kind[kind].losses == before.of_kind[kind].losses
        assert found.of_kind[kind].weight == before.of_kind[kind].weight
    assert found.undesirable_weight == 0.7


def test_a_schedule_reaches_the_pair_losses() -> None:
    """beta 0.1 to 0.4 at the end: D of 5 nats from 0.5 to 2."""
    uft = of_kinds({"pair": {"dpo": 1.0}}, beta_schedule="linear", beta_end=4.0)
    logps_N, reference_N = torch.tensor([-1.0, -2.0]), torch.tensor([-6.0, -2.0])
    for progress, margin in ((0.0, 0.5), (1.0, 2.0)):
        loss, _ = step_loss(objective_at(uft, progress), pair(0, (1, 1)), logps_N, reference_N)
        assert loss.item() == pytest.approx(-log_logistic(margin))


# ---- precision


def test_log_ratios_of_long_responses_keep_their_precision() -> None:
    """Sums of thousands of nats differ by 1e-3 a token: the log-ratio is right to 1e-6 nats, as float64 says."""
    generator = torch.Generator().manual_seed(0)
    batch = micro_batch([single("score", 0.3, 4000)])
    reference_N = -torch.rand(4000, generator=generator) * 8
    logps_N = reference_N + torch.randn(4000, generator=generator) * 1e-3
    sums = [values_N.double().sum()[None] for values_N in (logps_N, reference_N)]
    found = rewards_of(objective("mse"), batch, *sums).log_ratios_R
    expected = (logps_N.double() - reference_N.double()).sum()
    assert found.dtype == torch.float32
    assert abs(float(found - expected)) < 1e-6


def test_rewards_carry_the_policys_gradient_alone() -> None:
    """d r / d log pi = beta."""
    batch = micro_batch([single("score", 0.3, 4)])
    logps_R = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    rewards_of(objective("mse", 0.25), batch, logps_R, torch.tensor([-4.0]).double()).rewards_R.sum().backward()
    assert logps_R.grad is not None
    assert logps_R.grad.item() == 0.25


# ---- what others call these


def one_pair() -> tuple[list[Sequence], Tensor, Tensor]:
    """Log-ratios 8 (2 tokens) and -3 (3 tokens): rewards 0.8 and -0.3 at beta 0.1."""
    return pair(0, (2, 3)), torch.tensor([-1.0, -1.0, -2.0, -2.0, -2.0]), torch.tensor([-5.0, -5.0, -1.0, -1.0, -1.0])


def test_una_of_a_pairs_labels_is_bco_pair() -> None:
    """bce of labels 1 and 0: the mean of -log sigmoid(r_chosen) and -log sigmoid(-r_rejected)."""
    loss, _ = step_loss(of_kinds({"pair": {"bce": 1.0}}), *one_pair())
    assert loss.item() == pytest.approx((-log_logistic(0.8) - log_logistic(0.3)) / 2, rel=1e-6)


def test_una_of_a_pairs_scores_is_two_responses() -> None:
    """mse of scores 0.9 and 0.4: the mean of two squared errors, nothing of a difference."""
    _, logps_N, reference_N = one_pair()
    loss, _ = step_loss(of_kinds({"pair": {"mse": 1.0}}), pair(0, (2, 3), (0.9, 0.4)), logps_N, reference_N)
    assert loss.item() == pytest.approx(((logistic(0.8) - 0.9) ** 2 + (logistic(-0.3) - 0.4) ** 2) / 2, rel=1e-6)


def test_l1_with_a_shift_is_kto() -> None:
    """z0 = 0.25: the mean of 1 - sigmoid(r - z0) of the good and 1 - sigmoid(z0 - r) of the bad response."""
    sequences = [single("binary", 1.0, 2), single("binary", 0.0, 3)]
    _, logps_N, reference_N = one_pair()
    loss, _ = step_loss(of_kinds({"binary": {"l1": 1.0}}), sequences, logps_N, reference_N, torch.full((2,), 0.25))
    good, bad = 1 - logistic(0.8 - 0.25), 1 - logistic(0.25 + 0.3)
    assert loss.item() == pytest.approx((good + bad) / 2, rel=1e-6)


def test_the_constants_reach_the_losses_of_pairs() -> None:
    """D = 1.1: rpo_sq at eta 0.6 is (1.1 - 0.6)^2 = 0.25; hinge takes none: 0."""
    sequences, logps_N, reference_N = one_pair()
    uft = of_kinds({"pair": {"rpo_sq": 1.0, "hinge": 1.0}}, constants=PairConstants(rpo_scale=0.6))
    assert step_loss(uft, sequences, logps_N, reference_N)[0].item() == pytest.approx(0.25, rel=1e-5)
