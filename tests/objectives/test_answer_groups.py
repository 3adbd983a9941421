"""Which responses of a step are compared with each other, and what their scores alone say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Seq

import pytest
from by_hand import answer, of_kinds

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.errors import CheckFailed
from uft_ds.objectives.groups import Groups, group_means, groups_of, units_of
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.online import check_own_answers, online_target_problem
from uft_ds.objectives.reward_shift import RewardShift

CENTERED = of_kinds({kind: {"mse": 1.0} for kind in ("instruction", "score", "pair")}, center="prompt")
RLOO = of_kinds({"instruction": {"mse": 1.0}, "score": {"rloo": 1.0}})
REINFORCE = of_kinds({"instruction": {"mse": 1.0}, "score": {"reinforce": 1.0}})


def numbers(objective: Objective, sequences: Seq[Sequence]) -> list[int | None]:
    """The number of each sequence's group."""
    groups = groups_of(objective, Step(0, tuple(sequences)))
    return groups.numbers_in(objective, micro_batch(sequences))


def groups_by(objective: Objective, *sequences: Sequence) -> Groups:
    return groups_of(objective, Step(0, tuple(sequences)))


def test_answers_to_one_prompt_are_a_group() -> None:
    """By the prompt's tokens; numbered as they come; one that is alone has none."""
    sequences = [answer(0.1, 5), answer(0.2, 5, prompt=1), answer(0.9, 6), answer(1.0, 7, prompt=2), answer(0, 8, 9)]
    sequences.append(answer(0.5, 6, prompt=1, online=False))
    assert numbers(CENTERED, sequences) == [0, 1, 0, None, 0, 1]
    assert numbers(RLOO, sequences) == [0, None, 0, None, 0, None], "of the policy's own answers alone"
    assert numbers(REINFORCE, sequences) == [0, 0, 0, 0, 0, None], "all of them are one group"
    assert numbers(of_kinds({"score": {"mse": 1.0}}), sequences) == [None] * 6


def test_the_same_answer_of_data_is_no_other_answer() -> None:
    """A row that a step holds twice would be its own baseline and not be learned; the policy may repeat itself."""
    twice = [answer(0.1, 5, online=False), answer(0.1, 5, online=False)]
    assert numbers(CENTERED, twice) == [None, None]
    assert numbers(CENTERED, [*twice, answer(0.1, 6, online=False)]) == [0, 0, 0]
    assert numbers(CENTERED, [answer(0.1, 5), answer(0.1, 5)]) == [0, 0]
    assert numbers(RLOO, [answer(0.1, 5), answer(0.1, 5)]) == [0, 0]
    shifted = of_kinds({"score": {"mse": 1.0}}, shift=RewardShift("prompt_mean"))
    assert numbers(shifted, [answer(0.1, 5), answer(0.1, 5)]) == [None, None], "it would push the answer without end"


def test_instructions_are_never_centered() -> None:
    """Two good answers to one prompt would else have targets of 1/2; kinds with scores are compared across kinds."""
    sequences = [
        answer(1.0, 5, kind="instruction", online=False), answer(1.0, 6, kind="instruction", online=False),
        answer(0.3, 7), answer(0.5, 8, kind="pair", online=False),
    ]  # fmt: skip
    assert numbers(CENTERED, sequences) == [None, None, 0, 0]


def test_scores_of_a_group() -> None:
    """Mean and standard deviation of the sample; a flat group's are exactly its score and 0."""
    scores = [0.1, 0.7, 0.4, 0.2]
    (group,) = groups_by(CENTERED, *(answer(score, token) for token, score in enumerate(scores, start=5))).found
    assert group.num_responses == 4
    assert group.mean_score == pytest.approx(statistics.mean(scores))
    assert group.score_std == pytest.approx(statistics.stdev(scores))
    assert not group.is_flat
    for score in (0.1, 0.3, 0.7, 1 / 3):
        (flat,) = groups_by(CENTERED, *(answer(score, token) for token in range(5, 12))).found
        assert (flat.mean_score, flat.score_std, flat.is_flat) == (score, 0.0, True)


def test_groups_that_a_packing_divides() -> None:
    """Those of which one micro-batch holds a part; the others are not forwarded ahead."""
    sequences = [answer(0.1, 5), answer(0.2, 6), answer(0.1, 5, prompt=1), answer(0.2, 6, prompt=1), answer(1, 7)]
    groups = groups_by(CENTERED, *sequences)

    def divided(*parts: Seq[int]) -> set[int]:
        return groups.divided(CENTERED, [micro_batch([sequences[i] for i in part]) for part in parts])

    assert divided(range(5)) == set()
    assert divided([0, 1, 4], [2, 3], []) == set()
    assert divided([0, 1], [2, 3, 4]) == {0}
    assert divided([0, 1, 2], [3, 4]) == {0, 1}
    assert [divided([0, 1, 4, 2]), divided([3])] == [{1}, {1}], "each rank sees a part of it"
    ahead = units_of(CENTERED, groups, {1}, Step(3, tuple(sequences)))
    assert (ahead.index, ahead.sequences) == (3, (sequences[2], sequences[3]))


def test_means_of_groups_by_hand() -> None:
    """1 and 4 nats, and the one answer of 2 nats that the policy gave twice beside one of 5."""
    sequences = [answer(0.1, 5), answer(0.2, 6), *(answer(0, token, prompt=1) for token in (5, 5, 6))]
    step = Step(0, tuple(sequences))
    groups = groups_of(CENTERED, step)
    names = [(key, "score") for sequence in sequences for key in sequence.response_keys]
    ratios = dict(zip(names, (1.0, 4.0, 2.0, 2.0, 5.0), strict=True))
    assert group_means(CENTERED, groups, {0, 1}, step, ratios) == {0: 2.5, 1: 3.0}
    assert group_means(CENTERED, groups, {1}, step, {name: ratios[name] for name in names[2:]}) == {1: 3.0}


# ---- checks of own answers


def check(objective: Objective, *sequences: Sequence) -> None:
    step = Step(7, sequences)
    check_own_answers(objective, groups_of(objective, step), step)


def test_an_answer_that_nothing_compares_with_is_refused() -> None:
    """By its name and its step, not left out without a word."""
    group = [answer(0.1, 5), answer(0.9, 6)]
    instruction = answer(1.0, 5, prompt=3, kind="instruction", online=False)
    check(RLOO, *group, instruction)
    check(REINFORCE, *group, answer(0.2, 5, prompt=1), instruction)
    with pytest.raises(
        CheckFailed, match=r"score: rloo, step 7: 1:\(5,\) is the only answer to its prompt.*left out whole"
    ):
        check(RLOO, *group, answer(0.2, 5, prompt=1))
    with pytest.raises(CheckFailed, match=r"reinforce, step 7: 0:\(5,\) is the only answer in the step"):
        check(REINFORCE, group[0], instruction)
    with pytest.raises(CheckFailed, match=r"rloo, step 7: 0:\(7,\) is not an answer of this step's policy"):
        check(RLOO, *group, answer(0.2, 7, online=False))
    check(CENTERED, answer(0.2, 5, prompt=1), answer(0.2, 7, online=False))  # pointwise losses train on any


@pytest.mark.parametrize(
    ("losses", "shared", "mean_score", "number"),
    [
        ({"mse": 1.0}, {}, 0.2, "0.50"),
        ({"mse": 1.0}, {}, 0.5, None),
        ({"raw": 1.0}, {}, 0.499, "0.50"),
        ({"l1": 1.0}, {"shift": RewardShift("ema")}, 0.2, "0.50"),
        ({"mse": 1.0}, {"center": "prompt"}, 0.0, None),
        ({"rloo": 1.0}, {}, 0.0, None),
        ({"nll": 1.0}, {}, 0.0, None),
        # sigmoid(-2) = 0.119; raw compares r + 1/2 with the score
        ({"bce": 1.0}, {"shift": RewardShift("constant", value=2.0)}, 0.11, "0.12"),
        ({"bce": 1.0}, {"shift": RewardShift("constant", value=2.0)}, 0.13, None),
        ({"raw": 1.0}, {"shift": RewardShift("constant", value=0.25)}, 0.24, "0.25"),
        ({"raw": 1.0}, {"shift": RewardShift("constant", value=0.25)}, 0.26, None),
    ],
)
def test_scores_that_own_answers_cannot_meet(
    losses: dict[str, float], shared: dict[str, object], mean_score: float, number: str | None
) -> None:
    """The lowest mean implicit score is that of a reward of 0, less the shift; centred ones have none."""
    problem = online_target_problem(mean_score, of_kinds({"score": losses}, **shared))
    assert (problem is None) == (number is None)
    if problem is not None:
        assert f"about {number} or higher" in problem
        assert "center: prompt or rloo" in problem


def test_a_mean_score_is_a_score() -> None:
    """NaN, or a sum in its place, is not judged."""
    for wrong in (float("nan"), 3.0, -0.1):
        with pytest.raises(ValueError, match="expected a number in"):
            online_target_problem(wrong, CENTERED)
