"""Log-probs of a bfloat16 model: taken and summed in float32, where the harness by itself would round them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from asking import WORDS
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.evaluation.harness.batches import BatchSize
from uft_ds.evaluation.harness.model import CausalModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_answers_of_different_likelihood_stay_different(tiny_qwen2: Path) -> None:
    """Equal to the float32 log-softmax of the model's own bfloat16 logits, to a thousandth of bfloat16's step."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    asked = CausalModel(model, tokenizer, BatchSize(rows=1), lambda name, measure: measure())
    pairs = [("Which colour?", f" {'very ' * 4}{word} indeed") for word in WORDS[:4]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = {}
    for places in asked.batches("loglikelihood", requests):
        found |= dict(zip(places, asked.answer("loglikelihood", requests, places), strict=True))
    for number, (context, answer) in enumerate(pairs):
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, answer))
        with torch.no_grad():
            logits_TV = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
        expected = logits_TV.log_softmax(-1)[torch.arange(len(after)), after].sum().item()
        assert found[number][0] == pytest.approx(expected, abs=1e-3)
        assert abs(expected) > 64, "where neighbours in bfloat16 are half a nat apart"
