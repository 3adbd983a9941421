"""The prompt of a question is read once for all its choices, and each choice has the log-prob of its whole row."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import WORDS
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from uft_ds.evaluation.harness.batches import BatchSize
from uft_ds.evaluation.harness.model import CausalModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUESTIONS, CHOICES = 3, 4


def requests(words: int) -> list[Instance]:
    """Questions with choices of several lengths, one after the other, as the harness gives them."""
    made = []
    for number in range(QUESTIONS):
        prompt = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(words + number))
        for choice in range(CHOICES):
            answer = " " + " ".join(WORDS[choice : choice + 1 + choice])
            made.append(Instance("loglikelihood", {}, (prompt, answer), choice, ("colours", number, 1)))
    return made


def answered(
    model: Any, tokenizer: Any, asked: list[Instance], size: BatchSize | None
) -> tuple[list[Any], list[Any], int]:
    """The answers in the order of the requests, the batches, and how many tokens were forwarded, padding among them."""
    tokens = 0

    def count(module: Any, given: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> None:
        nonlocal tokens
        tokens += given[0].numel()

    causal = CausalModel(model, tokenizer, size, lambda name, measure: measure())
    batches = causal.batches("loglikelihood", asked)
    watching = model.get_input_embeddings().register_forward_hook(count)
    found = {}
    for places in batches:
        found |= dict(zip(places, causal.answer("loglikelihood", asked, places), strict=True))
    watching.remove()
    return [found[place] for place in range(len(asked))], batches, tokens


def with_window(tokenizer: Any) -> Any:
    """A model whose attention looks back 24 tokens, far fewer than a prompt has."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=24, max_position_embeddings=512,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["qwen2", "window"])
def test_a_prompt_is_read_once_for_all_choices(tiny_qwen2: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval() if kind == "qwen2" else with_window(tokenizer)
    asked = requests(40)
    expected, _, of_harness = answered(model, tokenizer, asked, BatchSize(rows=1))
    found, batches, tokens = answered(model, tokenizer, asked, None)
    assert sorted(map(sorted, batches)) == [[4 * number + choice for choice in range(4)] for number in range(QUESTIONS)]
    for (logp, greedy), (own_logp, own_greedy) in zip(expected, found, strict=True):
        assert own_logp == pytest.approx(logp, abs=1e-4)
        assert own_greedy == greedy
    assert tokens < 0.4 * of_harness


def test_short_prompts_are_batched_over_questions(tiny_qwen2: Path) -> None:
    """What they share is less than a batch of one question costs."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    _, batches, _ = answered(model, tokenizer, requests(3), None)
    assert len(batches) == 1


def test_a_model_whose_cache_is_not_exact_reads_whole_rows(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a cache that forgets the prompt's second half."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    expected, _, of_harness = answered(model, tokenizer, requests(40), BatchSize(rows=1))
    original = model.forward

    def forgetful(input_ids: Any = None, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 64:
            cache.crop(-(cache.get_seq_length() // 2))
        return original(input_ids, **options)

    forgetful.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", forgetful)
    found, _, tokens = answered(model, tokenizer, requests(40), None)
    assert tokens >= of_harness
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
