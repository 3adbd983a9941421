"""Draws by seeds: exact, each by its own seed, and nothing else in the process notices them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import PACKED, VOCAB_SIZE
from torch import Tensor
from transformers import AutoModelForCausalLM

from uft_ds.evaluation.drawing import Draw
from uft_ds.evaluation.generate import LEAST_TEMPERATURE
from uft_ds.rollouts.answers import Question

LOGITS_V = torch.tensor([1.5, 0.0, -1.0, 0.7, -3.0, 1.4])
CPU = torch.device("cpu")
NO_IDS = torch.zeros(1, 1, dtype=torch.long)
CHI_SQUARE = {1: 10.83, 2: 13.82, 5: 20.52}
"""Exceeded once in a thousand, by degrees of freedom."""


def drawn(seeds: list[int], count: int, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Tokens of each seed in turn: [count, seeds]."""
    draw = Draw(seeds, temperature=temperature, top_p=top_p, device=CPU)
    scores_BV = LOGITS_V.repeat(len(seeds), 1)
    return torch.stack([draw(NO_IDS, scores_BV.clone()).argmax(-1) for _ in range(count)])


def chi_square(tokens: Tensor, expected_V: Tensor) -> float:
    counts_V = torch.bincount(tokens.flatten(), minlength=len(expected_V)).double()
    possible = expected_V > 0
    assert counts_V[~possible].sum() == 0, "a token without probability was drawn"
    expected = expected_V[possible].double() * tokens.numel()
    return float(((counts_V[possible] - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    """20,000 draws against softmax(logits / temperature), by 400 seeds in turn and by the first draw of 20,000."""
    expected_V = (LOGITS_V / temperature).softmax(-1)
    seeds = list(Question((1,), 20_000, 5).seeds)
    assert chi_square(drawn(seeds[:400], 50, temperature=temperature), expected_V) < CHI_SQUARE[5]
    assert chi_square(drawn(seeds, 1, temperature=temperature), expected_V) < CHI_SQUARE[5]


def test_a_wrong_distribution_would_be_seen() -> None:
    """The bound rejects a temperature of 1.1 where 1 was asked for."""
    seeds = list(Question((1,), 400, 5).seeds)
    assert chi_square(drawn(seeds, 50, temperature=1.1), LOGITS_V.softmax(-1)) > CHI_SQUARE[5]


def test_top_p_cuts_and_keeps_the_proportions() -> None:
    """The likeliest three tokens together first pass 0.8; all others have no probability left."""
    probabilities_V = LOGITS_V.softmax(-1)
    kept = probabilities_V.argsort(descending=True)[:3]
    assert float(probabilities_V[kept].sum()) > 0.8 > float(probabilities_V[kept[:2]].sum())
    expected_V = torch.zeros_like(probabilities_V)
    expected_V[kept] = probabilities_V[kept] / probabilities_V[kept].sum()
    seeds = list(Question((1,), 400, 7).seeds)
    assert chi_square(drawn(seeds, 50, top_p=0.8), expected_V) < CHI_SQUARE[2]


def test_draws_that_follow_each_other_are_independent() -> None:
    """Pairs of neighbouring draws of a row, and of neighbouring rows, against the product of their probabilities."""
    tokens = drawn(list(range(400)), 50)  # seeds as close as they can be
    is_likeliest = (tokens == 0).long()
    share = float(LOGITS_V.softmax(-1)[0])
    both = torch.tensor([(1 - share) ** 2, share * (1 - share), share * (1 - share), share**2])
    for first, second in ((is_likeliest[::2], is_likeliest[1::2]), (is_likeliest[:, ::2], is_likeliest[:, 1::2])):
        assert chi_square(2 * first + second, both) < 16.27  # 3 degrees of freedom


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-5, LEAST_TEMPERATURE])
def test_next_to_no_temperature_is_the_likeliest_token(temperature: float) -> None:
    """Also where the two likeliest are 0.1 nats apart."""
    assert set(drawn([1, 2, 3], 200, temperature=temperature).flatten().tolist()) == {0}


def test_a_row_draws_the_same_in_any_batch() -> None:
    """Alone, in another place, and after others have left."""
    alone = drawn([11], 30)[:, 0]
    assert torch.equal(drawn([5, 11, 6], 30)[:, 1], alone)
    draw = Draw([5, 11, 6], temperature=1.0, top_p=1.0, device=CPU)
    tokens = []
    rows = [0, 1, 2]
    for number in range(30):
        scores = draw(NO_IDS, LOGITS_V.repeat(len(rows), 1))
        tokens.append(int(scores.argmax(-1)[rows.index(1)]))
        if number in (3, 9):
            leaves = 0 if number == 3 else rows.index(2)
            kept = [place for place in range(len(rows)) if place != leaves]
            draw.keep(kept)
            rows = [rows[place] for place in kept]
    assert tokens == alone.tolist()


def test_no_global_generator_is_used() -> None:
    """Neither is it moved, nor do draws depend on it."""
    before = torch.get_rng_state()
    first = drawn([1, 2], 20, top_p=0.9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(drawn([1, 2], 20, top_p=0.9), first)
    torch.set_rng_state(before)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[0.0, NAN, 1.0], [0.0, INFINITE, 1.0], [-INFINITE] * 3])
def test_logits_that_mean_nothing_are_remembered(temperature: float, logits: list[float]) -> None:
    """Of one row, whatever token comes of it; single tokens at -inf are a model's own way to forbid them."""
    draw = Draw([1, 2], temperature=temperature, top_p=1.0, device=CPU)
    draw(NO_IDS, LOGITS_V.repeat(2, 1))
    draw(NO_IDS, torch.tensor([[0.0, -INFINITE, 1.0]] * 2))
    assert draw.is_finite
    draw(NO_IDS, torch.tensor([[0.0, 2.0, 1.0], logits]))
    draw(NO_IDS, LOGITS_V.repeat(2, 1))
    assert not draw.is_finite


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.3, 0.5), (1.0, 1e-6)])
def test_the_distribution_is_that_of_generate(temperature: float, top_p: float) -> None:
    """The scores before the noise, bit for bit those from which `generate` samples with the same two settings."""
    model: Any = AutoModelForCausalLM.from_config(PACKED["llama"])
    ids_BT = torch.randint(3, VOCAB_SIZE, (4, 5), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "max_new_tokens": 1}
    theirs = model.generate(
        ids_BT, **options, output_logits=True, output_scores=True, return_dict_in_generate=True, eos_token_id=[]
    )
    draw = Draw([1, 2, 3, 4], temperature=temperature, top_p=top_p, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "exponential_", lambda self, generator: self.fill_(1.0))  # whose logarithm is 0
        ours = draw(ids_BT, theirs.logits[0].clone())
    assert torch.equal(ours, theirs.scores[0])
    assert bool((ours == -INFINITE).any()) == (top_p < 1.0)


def test_a_cut_token_never_wins() -> None:
    """-inf stays below all noise, also where a generator's number is 0."""
    draw = Draw([1], temperature=1.0, top_p=1.0, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "exponential_", lambda self, generator: self.zero_())
        scores = draw(NO_IDS, torch.tensor([[-float("inf"), 0.0, 1.0]]))
    assert scores.isnan().sum() == 0
    assert int(scores.argmax()) == 2
