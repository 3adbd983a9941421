"""Answers through one cache of a prompt, and without rows that have ended, against the obvious loop."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GPT2, LEAKS, PACKED, SIZES, VOCAB_SIZE
from suites import long_but
from transformers.cache_utils import DynamicLayer

from uft_ds.evaluation.cache import RoomyLayer, cache_is_exact
from uft_ds.evaluation.decoding import (
    PIECE,
    Decoding,
    Row,
    continue_at_once,
    continue_in_pieces,
    draw_of,
    through_stop,
)
from uft_ds.evaluation.generate import configured, generation_config
from uft_ds.streams import load

CPU = torch.device("cpu")
NEW = 2 * PIECE + 3
WITHOUT_STATE = ["opt", "gpt_oss", "falcon", "bloom"]
"""Families whose packed rows leak, but whose cache holds keys and values alone."""
WRAPPER = "qwen2_5_vl"
EXACT = {name: PACKED[name] for name in PACKED if name != WRAPPER}
EXACT |= {name: LEAKS[name] for name in WITHOUT_STATE} | {"gpt2": GPT2}
WITH_STATE = [WRAPPER, *(name for name in LEAKS if name not in WITHOUT_STATE)]


def prompts() -> list[tuple[int, ...]]:
    """Three prompts of uneven lengths, one within and two beyond the tiny models' sliding window of 8."""
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()) for length in (5, 21, 13)]


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = load.model_of(config)
    model.get_decoder().config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model.eval()


def obvious(model: Any, prompt: tuple[int, ...], how: Decoding, seed: int = 0) -> list[int]:
    """One row, no padding, no cache; draws as argmax of probabilities over exponential noise."""
    ids: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(ids) < how.max_new_tokens and not (ids and ids[-1] in how.stop_ids):
        logits_V = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1].float()
        scores_V = logits_V
        if how.temperature > 0:
            probabilities_V = (logits_V / how.temperature).softmax(-1)
            scores_V = probabilities_V / torch.empty_like(logits_V).exponential_(generator=generator)
        ids.append(int(scores_V.argmax()))
    return ids


def decoding(stop_ids: tuple[int, ...] = (), temperature: float = 0.0) -> Decoding:
    return Decoding(NEW, stop_ids, pad_id=0, temperature=temperature)


def answers_in_pieces(model: Any, rows: list[Row], how: Decoding, *, prompts_first: bool) -> list[list[int]]:
    config = generation_config(list(how.stop_ids), how.pad_id, max_new_tokens=how.max_new_tokens, temperature=0.0)
    with torch.no_grad(), configured(model, config):
        return continue_in_pieces(model, rows, how, draw_of(rows, how, CPU), device=CPU, prompts_first=prompts_first)


@pytest.mark.parametrize("name", long_but(("qwen2", "gemma2", "qwen3_moe", "gpt_neox"), EXACT))
@torch.no_grad()
def test_a_prompt_that_is_read_once_gives_the_greedy_answers(name: str) -> None:
    """Of each family: with rows that end in different pieces, a prompt three times, and prompts past the window."""
    model = model_of(EXACT[name])
    assert cache_is_exact(model, list(prompts()[1]), CPU)
    whole = [obvious(model, prompt, decoding()) for prompt in prompts()]
    how = decoding((whole[0][2], whole[1][PIECE + 1]))
    expected = [through_stop(answer, how.stop_ids) for answer in whole]
    asked = [0, 1, 0, 2, 0]
    rows = [Row(prompts()[number]) for number in asked]
    for prompts_first in (True, False):
        answers = answers_in_pieces(model, rows, how, prompts_first=prompts_first)
        assert answers == [expected[number] for number in asked], f"prompts first: {prompts_first}"


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_rounding_is_no_difference(name: str) -> None:
    """In bfloat16 the check passes what it passes in float32."""
    assert cache_is_exact(model_of(EXACT[name]).to(torch.bfloat16), list(prompts()[1]), CPU)


@torch.no_grad()
def test_half_precision_is_measured_too() -> None:
    """`uft eval --dtype float16` asks it: rounding passes, a prompt that is lost does not."""
    model = model_of(PACKED["qwen2"]).to(torch.float16)
    assert cache_is_exact(model, list(prompts()[1]), CPU)
    model.model.register_forward_pre_hook(_forgetting, with_kwargs=True)
    assert not cache_is_exact(model, list(prompts()[1]), CPU)


@pytest.mark.filterwarnings("ignore:The fast path is not available")
@pytest.mark.parametrize("name", long_but((WRAPPER, "mamba"), WITH_STATE))
@torch.no_grad()
def test_a_model_with_a_state_is_told_from_others(name: str) -> None:
    """Its cache is not taken apart; `generate` itself still answers."""
    model = model_of((PACKED | LEAKS)[name])
    prompt = prompts()[1]
    assert not cache_is_exact(model, list(prompt), CPU)
    if name == "recurrent_gemma":
        return  # transformers' own `generate` fails on two layers without attention (5.23)
    how, rows = decoding(), [Row(prompt), Row(prompt)]
    with configured(model, generation_config([], 0, max_new_tokens=NEW, temperature=0.0)):
        answers = continue_at_once(model, rows, how, draw_of(rows, how, CPU), device=CPU)
    assert answers == [obvious(model, prompt, how)] * 2


@torch.no_grad()
def test_a_model_that_computes_otherwise_with_a_cache_is_told() -> None:
    """The layers of its cache are known ones, but positions that begin anew behind the cache show in the numbers."""
    model = model_of(PACKED["qwen2"])
    model.model.register_forward_pre_hook(_forgetting, with_kwargs=True)
    assert not cache_is_exact(model, list(prompts()[1]), CPU)


def _forgetting(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook by which positions begin anew behind the cache."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
    return args, kwargs


@torch.no_grad()
def test_a_nan_is_not_exact() -> None:
    """No comparison with it passes."""
    model = model_of(PACKED["qwen2"])
    model.model.norm.weight.fill_(float("nan"))
    assert not cache_is_exact(model, list(prompts()[1]), CPU)


@pytest.mark.parametrize("prompts_first", [True, False])
@torch.no_grad()
def test_drawn_answers_are_those_of_each_row_alone(prompts_first: bool) -> None:
    """At temperature 1, of the same prompt by several seeds, with rows that leave early."""
    model = model_of(PACKED["mistral"])
    short, long, middle = prompts()
    rows = [Row(short, 7), Row(long, 8), Row(short, 9), Row(long, 7), Row(middle, 1)]
    whole = [obvious(model, row.token_ids, decoding(temperature=1.0), row.seed) for row in rows]
    how = decoding((whole[0][3], whole[1][PIECE + 1]), temperature=1.0)
    expected = [through_stop(answer, how.stop_ids) for answer in whole]
    assert len(expected[0]) == 4
    assert len({len(answer) for answer in expected}) > 2
    assert answers_in_pieces(model, rows, how, prompts_first=prompts_first) == expected


@torch.no_grad()
def test_ended_rows_leave_and_shared_prompts_are_read_once() -> None:
    """Counted in tokens that pass the model: [rows, tokens] of each forward."""
    model = model_of(PACKED["llama"])
    prompt = prompts()[1]
    whole = obvious(model, prompt, decoding(temperature=1.0), 1)
    rows, how = [Row(prompt, 1), Row(prompt, 2), Row(prompt, 3)], decoding((whole[4],), temperature=1.0)
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    answers = answers_in_pieces(model, rows, how, prompts_first=True)
    assert len(answers[0]) == 5
    assert shapes[0] == (1, len(prompt) - 1)
    assert shapes[1 : 1 + PIECE] == [(3, 1)] * PIECE
    alive = sum(len(answer) > PIECE for answer in answers)
    assert shapes[1 + PIECE] == (alive, 1)
    assert len(shapes) <= 1 + NEW


def test_no_forward_after_the_last_row_has_ended() -> None:
    """Nor a further piece: the answer of four tokens takes four forwards."""
    model = model_of(PACKED["llama"])
    with torch.no_grad():
        whole = obvious(model, prompts()[1], decoding())
    how = decoding((whole[3],))
    expected = through_stop(whole, how.stop_ids)
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda _, args: forwards.append(1))
    assert answers_in_pieces(model, [Row(prompts()[1])], how, prompts_first=False) == [expected]
    assert len(forwards) == len(expected)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("crop"), st.integers(0, 1)),
    ),
    max_size=12,
)


@given(OPERATIONS, st.integers(0, 12))
def test_a_layer_with_room_is_transformers_own(operations: list[tuple[str, Any]], room: int) -> None:
    """After any order of appending, selecting, repeating and cropping, the same bits."""
    ours, theirs = RoomyLayer(room), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    batch = 2
    for kind, value in [("append", 3), *operations]:
        for layer in (ours, theirs):
            if kind == "append":
                state = generator.get_state()
                new = torch.randn(2, batch, 2, value, 3, generator=generator)
                layer.update(new[0], new[1])
                if layer is ours:
                    generator.set_state(state)
            elif kind == "select":
                layer.batch_select_indices(torch.tensor([min(row, batch - 1) for row in value]))
            elif kind == "repeat":
                layer.batch_repeat_interleave(value)
            elif layer.get_seq_length() > value:
                layer.crop(-value)
        batch = len(value) if kind == "select" else batch * value if kind == "repeat" else batch
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_layer_with_room_copies_nothing_while_it_has_room() -> None:
    """The keys stay where they are, up to the tokens that it was made for."""
    layer = RoomyLayer(10)
    new = torch.ones(1, 1, 1, 2)
    places = {layer.update(new, new)[0].data_ptr() for _ in range(10)}
    assert len(places) == 1
    layer.update(new, new)
    assert layer.get_seq_length() == 11
    assert float(layer.keys.sum()) == 22


def test_the_memory_of_rows_that_leave_is_free_at_once() -> None:
    """All rows together are held no longer than until some are taken, and before the next token is appended."""
    layer = RoomyLayer(10)
    new = torch.ones(3, 1, 1, 2)
    everything = weakref.ref(layer.update(new, new)[0]._base)
    assert everything() is not None
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert everything() is None


def test_the_window_of_these_models_is_shorter_than_the_prompts() -> None:
    """Otherwise nothing above would say anything of sliding windows."""
    assert PACKED["mistral"].sliding_window < min(len(prompt) for prompt in prompts()[1:])
    assert SIZES["max_position_embeddings"] > max(map(len, prompts())) + NEW
