"""The builtin generator on one process: whose answers they are, and what it leaves as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_process import OneProcess
from tiny import IM_END, MAX_LENGTH, VOCAB_SIZE
from toy import toy_model

from uft_ds.errors import CheckFailed, Stopped
from uft_ds.rollouts.answers import Answer, PolicyVersion, Question, Sampling, Unanswered
from uft_ds.rollouts.builtin import BuiltinGenerator
from uft_ds.streams.adapters import as_stream
from uft_ds.streams.packed_attention import PACKED, attention_of_transformers
from uft_ds.streams.stream import POLICY

NEW = 16
STOPS = (IM_END, *range(3, 23))
"""Of 259 tokens: an answer at temperature 1 ends after some dozen tokens."""


@pytest.fixture(scope="module")
def engine(tiny_qwen2: Path) -> Any:
    return OneProcess(toy_model(tiny_qwen2, attention=PACKED))


def questions() -> list[Question]:
    """Uneven prompts, asked uneven times, one prompt twice with other seeds."""
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()) for length in (6, 19, 11)]
    return [
        Question(prompts[0], 3, seed=1),
        Question(prompts[1], 1, seed=2),
        Question(prompts[2], 4, seed=3),
        Question(prompts[0], 2, seed=4),
    ]


def generator_of(engine: Any, *, temperature: float = 1.0, top_p: float = 1.0, **options: Any) -> BuiltinGenerator:
    sampling = Sampling(temperature, top_p, NEW, STOPS)
    return BuiltinGenerator(engine, sampling, **({"pad_id": IM_END, "tokens_per_batch": 10_000} | options))


@torch.no_grad()
def expected_answers(engine: Any, asked: list[Question], *, temperature: float, top_p: float) -> list[Any]:
    """One answer at a time, without a cache: the largest probability over exponential noise of the answer's seed."""
    base = engine.module.policy.get_base_model()

    def answer(prompt: tuple[int, ...], seed: int) -> Answer:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        while len(ids) < NEW and not (ids and ids[-1] in STOPS):
            logits_V = base(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1]
            probabilities_V = (logits_V / temperature).softmax(-1)
            ordered = probabilities_V.argsort(descending=True)
            before = probabilities_V[ordered].cumsum(0) - probabilities_V[ordered]
            probabilities_V[ordered[before >= top_p]] = 0.0
            noise_V = torch.empty(VOCAB_SIZE).exponential_(generator=generator)
            ids.append(int((probabilities_V / noise_V).argmax()))
        return Answer(tuple(ids), ids[-1] in STOPS)

    with as_stream(base, POLICY), attention_of_transformers(base):
        return [tuple(answer(question.token_ids, seed) for seed in question.seeds) for question in asked]


@pytest.mark.parametrize(("temperature", "top_p"), [pytest.param(1.0, 1.0, marks=pytest.mark.long), (0.7, 0.9)])
def test_answers_are_drawn_from_the_policy_by_their_seeds(engine: Any, temperature: float, top_p: float) -> None:
    """Against one answer at a time, for batches of all, of some and of one; they end in their stop token or are cut."""
    expected = expected_answers(engine, questions(), temperature=temperature, top_p=top_p)
    flat = [answer for of_question in expected for answer in of_question]
    assert any(answer.ended for answer in flat)
    assert not all(answer.ended for answer in flat)
    assert len({answer.token_ids for answer in flat}) == len(flat)
    for tokens_per_batch in (10_000, 3 * (19 + NEW), 1):
        generator = generator_of(engine, temperature=temperature, top_p=top_p, tokens_per_batch=tokens_per_batch)
        assert generator.answer(questions()) == expected
        assert generator.continues_caches


def test_answers_do_not_depend_on_the_other_questions(engine: Any) -> None:
    """Asked alone, a question has the same answers as among others."""
    together = generator_of(engine).answer(questions())
    assert [generator_of(engine).answer([question])[0] for question in questions()] == together


def test_answers_are_those_of_the_adapter(engine: Any) -> None:
    """The bare base would answer otherwise."""
    base = engine.module.policy.get_base_model()
    with as_stream(base, engine.module.streams["reference"]):
        answers = generator_of(engine).answer(questions())
        assert base.model.layers[0].self_attn.q_proj._disable_adapters, "the block's own choice is restored"
    assert answers == generator_of(engine).answer(questions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uft_ds.evaluation.on_ranks.POLICY", engine.module.streams["reference"])
        assert generator_of(engine).answer(questions()) != answers


def test_nothing_is_left_changed(engine: Any) -> None:
    """Torch's generator, the model's mode, its attention, its settings of generation, and no gradient."""
    base = engine.module.policy.get_base_model()
    engine.module.train()
    settings, state = base.generation_config, torch.get_rng_state()
    generator_of(engine, top_p=0.9).answer(questions())
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.module.training
    assert base.training
    assert base.generation_config is settings
    assert base.config._attn_implementation == PACKED
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_what_does_not_fit_is_unanswered(engine: Any) -> None:
    """The others are answered, as if it had not been asked; nothing fits into 512 positions beside 493 tokens."""
    long = Question((65,) * (MAX_LENGTH - NEW + 1), 2, seed=5)
    short, other = questions()[:2]
    answers = generator_of(engine).answer([short, long, Question((), 1, seed=6), other])
    assert answers == [
        *generator_of(engine).answer([short]),
        Unanswered("the prompt has 497 tokens, with 16 of an answer more than the 512 positions of the model"),
        Unanswered("the prompt has no token"),
        *generator_of(engine).answer([other]),
    ]
    assert generator_of(engine).answer([long]) == answers[1:2]
    assert generator_of(engine).answer([]) == []
    fits = Question((65,) * (MAX_LENGTH - NEW), 1, seed=5)
    assert not isinstance(generator_of(engine).answer([fits])[0], Unanswered)


def test_it_stops_between_batches(engine: Any) -> None:
    """Before each batch it is asked; progress counts answers."""
    done: list[int] = []
    asked: list[int] = []

    def stop_after(batches: int) -> Callable[[], None]:
        def stop() -> None:
            asked.append(len(done))
            if len(done) == batches:
                raise Stopped("stopped", by_all=True)

        return stop

    generator_of(engine, tokens_per_batch=1, stop=stop_after(99), on_done=done.append).answer(questions())
    assert done == list(range(1, 11))
    assert asked == list(range(10))
    done.clear()
    with pytest.raises(Stopped):
        generator_of(engine, tokens_per_batch=1, stop=stop_after(2), on_done=done.append).answer(questions())
    assert done == [1, 2]
    assert engine.module.training


def test_logits_that_are_no_numbers_are_refused(tiny_qwen2: Path) -> None:
    """Their largest is a token like any other."""
    model = toy_model(tiny_qwen2)
    model.policy.get_base_model().model.norm.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(CheckFailed, match="logits are not finite"):
        generator_of(OneProcess(model)).answer(questions())


def test_a_model_with_another_cache_answers_the_same(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is then read by itself and stays to the end of its batch."""
    expected = generator_of(engine).answer(questions())
    monkeypatch.setattr("uft_ds.evaluation.on_ranks.cache_is_exact", lambda *_: False)
    generator = generator_of(engine)
    assert generator.answer(questions()) == expected
    assert generator.continues_caches is False


def test_the_identity_is_plain_values(engine: Any) -> None:
    """As they stand in a record; sizes of batches are not in it."""
    identity = generator_of(engine).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["generator"] == "builtin"
    assert generator_of(engine, tokens_per_batch=7).identity() == identity
    assert generator_of(engine, temperature=0.5).identity() != identity


def test_it_is_a_generator_that_needs_no_adapter(engine: Any) -> None:
    """What a loop asks of it: all ranks call it, and nothing is published."""
    generator = generator_of(engine)
    assert generator.on_all_ranks
    assert not generator.needs_adapter
    generator.publish(PolicyVersion(0, "0" * 64), {})
    generator.close()
