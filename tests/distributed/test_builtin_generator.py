"""The ranks answer by their own policy: the same answers on any number of ranks, and the training keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engines import accumulate, engine_of, weights
from mixtures import TARGETS, build_mixture
from ranks import run_on_ranks
from reference_traffic import counting
from suites import long_but
from tiny import IM_END, build_tiny_model
from toy import UFT, toy_sequences, toy_step
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from wrappers import build_wrapper

from uft_ds.architectures.facts import wraps_a_language_model
from uft_ds.data.packing import rank_micro_batches
from uft_ds.engine.engine import Engine
from uft_ds.errors import Stopped
from uft_ds.evaluation import on_ranks
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.rollouts.answers import Question, Sampling
from uft_ds.rollouts.builtin import BuiltinGenerator
from uft_ds.rollouts.room import fits_whole

NEW = 12
STOPS = (IM_END, *range(3, 23))
LONGEST = 24


def questions() -> list[Question]:
    """Three prompts of 4 to 24 tokens, asked 3, 1 and 3 times."""
    tokens = [sequence.token_ids_T[: 4 + 10 * n].tolist() for n, sequence in enumerate(toy_sequences(3, seed=3))]
    return [Question(tuple(ids), 3 - 2 * (n % 2), seed=10 + n) for n, ids in enumerate(tokens)]


def generator_of(engine: Engine, *, temperature: float = 1.0, rows: int = 3, **options: Any) -> BuiltinGenerator:
    """So many answers a rank and batch: with 3 on two ranks, the second batch has one answer for both."""
    sampling = Sampling(temperature, 1.0, NEW, STOPS)
    return BuiltinGenerator(engine, sampling, pad_id=IM_END, tokens_per_batch=rows * (LONGEST + NEW), **options)


def all_answers(folder: Path, file: str, model: dict[str, Any]) -> dict[str, Any]:
    """Greedy and drawn, with layers gathered for each token and with all weights whole, by batches of 3 and 1."""
    engine = engine_of(folder, file=file, **model)
    found = {}
    for name, options in {
        "greedy": {"temperature": 1e-9},
        "drawn": {},
        "drawn, whole": {"whole": True},
        "drawn, one a batch": {"rows": 1, "whole": True},
    }.items():
        generator = generator_of(engine, **options)
        found[name] = generator.answer(questions())
        assert generator.continues_caches != wraps_a_language_model(AutoConfig.from_pretrained(folder))
    assert fits_whole(engine, tokens=100)
    return found


def test_answers_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """One rank, two under ZeRO-3 and two under ZeRO-2, also where a batch has no answer for a rank."""
    build_tiny_model(tmp_path)
    (expected,) = run_on_ranks(all_answers, 1, tmp_path, "zero3_cpu", {})
    drawn = [answer for of_question in expected["drawn"] for answer in of_question]
    assert any(answer.ended for answer in drawn)
    assert len({len(answer.token_ids) for answer in drawn}) > 2
    assert expected["drawn"] == expected["drawn, whole"] == expected["drawn, one a batch"] != expected["greedy"]
    assert len({answer.token_ids for answer in expected["greedy"][0]}) == 1
    for file in ("zero3_cpu", "zero2"):
        for of_rank in run_on_ranks(all_answers, 2, tmp_path, file, {}):
            assert of_rank == expected, file


DIVIDED: dict[str, Any] = {"attention": "packed", "sequence_size": 2}
MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "divided rows": (build_tiny_model, DIVIDED),
    "divided rows, all parameters": (build_tiny_model, DIVIDED | {"trains_all": True}),
    "experts": (partial(build_mixture, family="qwen3_moe"), {"targets": TARGETS, "b_std": 0.0}),
    "gemma3 with images": (partial(build_wrapper, name="gemma3"), {"b_std": 0.0}),
    "qwen2_5_vl": (partial(build_wrapper, name="qwen2_5_vl"), {"b_std": 0.0}),
    "mistral3": (partial(build_wrapper, name="mistral3"), {"b_std": 0.0}),
}
"""How a model is built, and its options on two ranks."""


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_other_models_answer_alike(tmp_path: Path, name: str) -> None:
    """One rank, and two: also ranks that share rows, which answer whole ones. Without what adapters change, the greedy
    answers are those of Hugging Face's `generate`, a prompt at a time."""
    build, options = MODELS[name]
    folder = build(tmp_path)
    alone = {key: value for key, value in options.items() if key != "sequence_size"}
    (expected,) = run_on_ranks(all_answers, 1, folder, "zero3_cpu", alone)
    for of_rank in run_on_ranks(all_answers, 2, folder, "zero3_cpu", options):
        assert of_rank == expected
    if options.get("b_std") == 0.0 or "trains_all" in options:
        assert [answers[0].token_ids for answers in expected["greedy"]] == greedy_by_hugging_face(folder)


def greedy_by_hugging_face(folder: Path) -> list[tuple[int, ...]]:
    is_wrapper = wraps_a_language_model(AutoConfig.from_pretrained(folder))
    model = (AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM).from_pretrained(folder)
    found = []
    for question in questions():
        ids = torch.tensor([question.token_ids])
        how = {"max_new_tokens": NEW, "eos_token_id": list(STOPS), "pad_token_id": IM_END, "do_sample": False}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        found.append(tuple(answer[0, ids.shape[1] :].tolist()))
    return found


def answered_here(folder: Path) -> tuple[list[int], list[int]]:
    """How many rows this rank continued in each batch, and how many answers there were after it."""
    engine, rows, done = engine_of(folder, file="zero2", **DIVIDED), [], []
    continued = on_ranks.continue_in_pieces

    def counting(model: Any, given: Any, *args: Any, **options: Any) -> Any:
        rows.append(len(given))
        return continued(model, given, *args, **options)

    with patch.object(on_ranks, "continue_in_pieces", counting):
        generator_of(engine, rows=4, on_done=done.append).answer(questions())
    return rows, done


@pytest.mark.long
def test_ranks_that_share_rows_share_the_answering(tmp_path: Path) -> None:
    """Of seven answers one takes three and the other four, at once: together they have memory for eight."""
    assert run_on_ranks(answered_here, 2, build_tiny_model(tmp_path)) == [([3], [7]), ([4], [7])]


def one_step(engine: Engine) -> tuple[Any, ...]:
    batches = rank_micro_batches(toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size)
    grads, loss = accumulate(engine, batches, UFT)
    result = engine.step(1e-2)
    return loss, result.grad_norm, grads


def training(folder: Path, file: str, whole: bool | None) -> tuple[list[Any], dict[str, torch.Tensor], list[Any], int]:
    """Three steps, with or without answers before each: what each gave, the weights, the answers, and lost traces."""
    engine = engine_of(folder, file=file)
    steps, answers, invalidations = [], [], 0
    for _ in range(3):
        before = torch.get_rng_state()
        if whole is not None:
            answers.append(generator_of(engine, whole=whole).answer(questions()))
        assert torch.equal(torch.get_rng_state(), before), "a generator was used"
        assert engine.module.training
        with counting() as counters:
            steps.append((*one_step(engine), counters.gathers))
        invalidations += counters.invalidations
    return steps, weights(engine), answers, invalidations


def assert_same_bits(found: Any, expected: Any) -> None:
    for (loss, norm, grads, _), (loss_then, norm_then, grads_then, _) in zip(found[0], expected[0], strict=True):
        assert (loss, norm) == (loss_then, norm_then)
        assert all(torch.equal(grads[name], grads_then[name]) for name in grads_then)
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("file", long_but(["zero3_cpu"], ["zero3_cpu", "zero2"]))
def test_answers_change_no_bit_of_the_training(tmp_path: Path, file: str) -> None:
    """Losses, norms, gradients and adapters of three steps on two ranks; no generator of torch moves.

    Answers change as the policy does, and are the same on both ranks. With whole weights no prefetch trace is lost, and
    each step gathers what it gathers without answers.
    """
    build_tiny_model(tmp_path)
    without = run_on_ranks(training, 2, tmp_path, file, None)
    for whole in (True, False) if file == "zero3_cpu" else (True,):
        with_answers = run_on_ranks(training, 2, tmp_path, file, whole)
        for found, expected in zip(with_answers, without, strict=True):
            assert_same_bits(found, expected)
            if whole:
                assert found[3] == expected[3]
                assert [step[3] for step in found[0][1:]] == [step[3] for step in expected[0][1:]]
        assert with_answers[0][2] == with_answers[1][2]
        first, *_, last = with_answers[0][2]
        assert first != last


def gathers(folder: Path) -> dict[str, Any]:
    """All-gathers while answering, by way and number of tokens, and parameters that are not partitioned afterwards."""
    engine = engine_of(folder)
    question = [Question(tuple(range(30, 40)), 2, seed=1)]
    found: dict[str, Any] = {"parameters": len(list(engine.module.parameters()))}
    for whole in (False, True):
        for tokens in (4, 12):
            generator = BuiltinGenerator(
                engine, Sampling(1.0, 1.0, tokens, ()), pad_id=IM_END, tokens_per_batch=1000, whole=whole
            )
            generator.answer(question)  # with the first one the model is checked
            with counting() as counters:
                generator.answer(question)
            found[f"whole: {whole}, {tokens} tokens"] = counters.gathers
            left = [
                parameter for parameter in engine.module.parameters() if parameter.ds_status.name != "NOT_AVAILABLE"
            ]
            found["left"] = len(left) if whole else 0
    return found


def test_whole_weights_are_gathered_once(tmp_path: Path) -> None:
    """One all-gather for each parameter, whatever the number of tokens; without, each layer again for each token.

    Two layers, the embedding, the norm and the head: at least four all-gathers a token, where nothing is kept.
    """
    build_tiny_model(tmp_path)
    for found in run_on_ranks(gathers, 2, tmp_path):
        assert found["whole: True, 4 tokens"] == found["whole: True, 12 tokens"] == found["parameters"]
        more = found["whole: False, 12 tokens"] - found["whole: False, 4 tokens"]
        assert more >= 8 * 4
        assert found["left"] == 0


def stopped(folder: Path, whole: bool) -> tuple[list[int], bool, bool, list[Any]]:
    """Rank 1 is asked to stop while the second batch is answered; then all are asked again."""
    engine = engine_of(folder)
    request, done = StopRequest(), []

    def on_done(count: int) -> None:
        done.append(count)
        if engine.rank == 1 and len(done) == 2:
            request.hear(15)

    generator = generator_of(engine, rows=1, whole=whole, stop=Stop(request, engine.agree).check, on_done=on_done)
    try:
        generator.answer(questions())
        raise AssertionError("it did not stop")
    except Stopped as reason:
        by_all = reason.by_all
    return done, by_all, engine.module.training, generator_of(engine).answer(questions())


@pytest.mark.long
@pytest.mark.parametrize("whole", [True, False])
def test_all_ranks_stop_at_the_same_batch(tmp_path: Path, whole: bool) -> None:
    """One answer a rank and batch, 2 and 4 answers are done on both; what follows is answered as ever."""
    build_tiny_model(tmp_path)
    (expected,) = run_on_ranks(drawn_answers, 1, tmp_path)
    for done, by_all, is_training, answers in run_on_ranks(stopped, 2, tmp_path, whole):
        assert done == [2, 4]
        assert by_all
        assert is_training
        assert answers == expected


def drawn_answers(folder: Path) -> list[Any]:
    return generator_of(engine_of(folder)).answer(questions())


def nan_on_one_rank(folder: Path) -> str:
    """The weights of rank 1 alone are broken, as by a faulty memory."""
    engine = engine_of(folder, file="zero2")
    generator = generator_of(engine)
    generator.answer(questions())
    if engine.rank == 1:
        engine.module.policy.get_base_model().model.norm.weight.data.fill_(float("nan"))
    return raised(lambda: generator.answer(questions()))


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_nan_on_one_rank_ends_all(tmp_path: Path) -> None:
    """No rank goes on with tokens that mean nothing."""
    build_tiny_model(tmp_path)
    for error in run_on_ranks(nan_on_one_rank, 2, tmp_path):
        assert error.startswith("CheckFailed: the policy's logits are not finite")
