"""Reward models of transformers' own format: scores are those of one conversation alone, whatever stands beside it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForSequenceClassification,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from wrappers import WRAPPERS

from uft_ds.data.example import Message
from uft_ds.errors import UserError
from uft_ds.scoring.item import Item
from uft_ds.scoring.reward import RewardScorer, pooled_position

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
DECODERS = {
    "llama": (LlamaConfig, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
}


NEWLINE = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ċ")
"""The token that every conversation of the tiny tokenizer ends with."""


def save(folder: Path, name: str = "llama", *, num_labels: int = 1, pad: int | None = 2) -> Path:
    """A random model and its tokenizer. pad: 2 is <|im_end|>, which stands in the middle of conversations, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "bert":
            model: Any = BertForSequenceClassification(
                BertConfig(**SIZES, num_labels=num_labels, initializer_range=0.3)
            )
        else:
            config, made = DECODERS[name]
            model = made(
                config(**SIZES, num_key_value_heads=2, num_labels=num_labels, pad_token_id=pad, initializer_range=0.3)
            )
    model.save_pretrained(folder)
    build_tiny_tokenizer(folder)
    return folder


def items(*responses: str) -> list[Item]:
    turns = Message("system", "Be brief."), Message("user", "Name a prime.")
    return [Item(f"rows.jsonl:{line}", turns, text) for line, text in enumerate(responses, start=1)]


RESPONSES = ["7", "The number seven is one of them, and so are eleven and thirteen.", "9", "no " * 60, "13 or 17"]


@pytest.mark.parametrize(
    ("name", "pad"), [("llama", 2), ("llama", 0), ("llama", None), ("llama", NEWLINE), ("qwen2", 2), ("bert", 0)]
)
def test_a_score_is_that_of_the_conversation_alone(name: str, pad: int | None, tmp_path: Path) -> None:
    """As transformers gives it to the tokens of one conversation without padding, for models that pad by anything."""
    folder = save(tmp_path / "rm", name, pad=pad)
    found = [one.value for one in RewardScorer(folder).score(items(*RESPONSES))]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for one in items(*RESPONSES):
        turns = [{"role": m.role, "content": m.content} for m in one.messages]
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": one.response}], tokenize=False)
        with torch.inference_mode():
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            expected.append(float(model(input_ids=ids).logits[0, 0]))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_changes_no_score(name: str, tmp_path: Path) -> None:
    """Alone, beside a short one, beside a long one, in another order."""
    scorer = RewardScorer(save(tmp_path / "rm", name))
    alone = [scorer.score(items(text))[0].value for text in RESPONSES]
    together = [one.value for one in scorer.score(items(*RESPONSES))]
    turned = [one.value for one in scorer.score(items(*RESPONSES[::-1]))][::-1]
    assert together == pytest.approx(alone, abs=1e-5)
    assert turned == pytest.approx(alone, abs=1e-5)


def test_the_pooled_token_is_the_last_that_is_no_padding() -> None:
    """Where a conversation ends with the token that pads, transformers takes the one before; so do we."""
    assert pooled_position([5, 6, 7], None) == 2
    assert pooled_position([5, 6, 2], 2) == 1
    assert pooled_position([5, 2, 7, 2, 2], 2) == 2
    assert pooled_position([2, 2], 2) == 0


def test_a_conversation_that_is_too_long_is_a_failure(tmp_path: Path) -> None:
    """It is not cut: config.json allows 512 tokens, the option fewer."""
    folder = save(tmp_path / "rm")
    short, long = RewardScorer(folder).score(items("7", "x" * 600))
    assert short.value is not None
    assert long.value is None
    assert "at most 512" in long.reason
    assert RewardScorer(folder, max_length=20).score(items("7"))[0].value is None


def test_a_wrapper_reads_as_much_as_its_language_model(tmp_path: Path) -> None:
    """A model of images and text with a head has its positions and its padding token in the config of its language
    model alone: of 512 tokens one more fails, by its length."""
    config = deepcopy(WRAPPERS["gemma3"])
    config.num_labels = 1
    Gemma3ForSequenceClassification(config).save_pretrained(tmp_path)
    build_tiny_tokenizer(tmp_path)
    short, long = RewardScorer(tmp_path).score(items("7", "7" * 600))
    assert short.value is not None
    assert long.value is None
    assert "at most 512" in long.reason


def test_a_conversation_is_as_long_as_the_positions_are(tmp_path: Path) -> None:
    """Of RoBERTa's 130 positions the first two are not for tokens: 128 are read, 129 fail, as more by option does."""
    config = RobertaConfig(**SIZES | {"max_position_embeddings": 130}, num_labels=1, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    build_tiny_tokenizer(tmp_path)
    scorer = RewardScorer(tmp_path)
    found = scorer.score(items(*("x" * length for length in range(40, 128))))
    assert {one.reason for one in found if one.value is None} >= {"129 tokens, at most 128 can be read"}
    assert any(one.value is not None for one in found)
    with pytest.raises(UserError, match="--max-length 129: the model reads 128 tokens"):
        RewardScorer(tmp_path, max_length=129)


def test_a_token_that_the_model_does_not_know_is_a_failure(tmp_path: Path) -> None:
    """A tokenizer of another model, with more tokens."""
    LlamaForSequenceClassification(
        LlamaConfig(**SIZES | {"vocab_size": 40}, num_key_value_heads=2, num_labels=1)
    ).save_pretrained(tmp_path)
    build_tiny_tokenizer(tmp_path)
    assert "the model knows 40 tokens" in RewardScorer(tmp_path).score(items("7"))[0].reason


def test_another_head_is_another_scorer(tmp_path: Path) -> None:
    """The identity holds the files, the type and the longest length; not the folder's place."""
    first = RewardScorer(save(tmp_path / "a" / "rm")).identity()
    assert RewardScorer(save(tmp_path / "b" / "rm")).identity() == first
    assert RewardScorer(save(tmp_path / "c" / "rm", "qwen2")).identity() != first
    assert RewardScorer(tmp_path / "a" / "rm", max_length=100).identity() != first


def test_a_model_without_a_classifier_is_refused_in_whole_words(tmp_path: Path) -> None:
    """Transformers lists all model types that have one, of which the first ones are shown."""
    GraniteConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    build_tiny_tokenizer(tmp_path)
    with pytest.raises(UserError) as refused:
        RewardScorer(tmp_path)
    message = str(refused.value)
    assert "Unrecognized configuration class" in message
    assert "Model type should be one of GPT2Config" in message
    *_, last, dots = message.split()
    assert (last.endswith("Config,"), dots) == (True, "...)")


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    """Each with what was found and what was expected."""
    causal = tmp_path / "causal"
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(causal)
    build_tiny_tokenizer(causal)
    plain = save(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    (plain / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(plain)
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    run.mkdir()
    (run / "recipe.yaml").write_text("name: x\n")
    for folder, said in (
        (tmp_path / "nowhere", "no such folder"),
        (causal, "score.weight"),
        (save(tmp_path / "two", num_labels=2), "2 outputs"),
        (plain, "no chat template"),
        (adapter, "holds an adapter"),
        (run, "is a run of uft"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(UserError, match=said):
            RewardScorer(folder)
