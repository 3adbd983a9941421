#!/usr/bin/env bash
# lm-eval 0.4.13, torch 2.13.0, transformers 5.23.0: with a bfloat16 model, answers of different likelihood come out equal.
#
# `HFLM` takes the log-softmax in the type of the logits and sums the tokens in it, unless it is given `softmax_dtype`, which
# is None by default. bfloat16 has 8 significant bits: between 64 and 128 nats neighbouring values are half a nat apart. The
# log-likelihood of an answer of some ten tokens is thereby rounded to such steps, the sum of its tokens once more.
#
# A choice among answers (ARC, HellaSwag, MMLU) takes the first of equal ones, so that accuracies depend on the order in
# which the answers stand. Nothing is said. `--model_args ...,softmax_dtype=float32` keeps the model and mends the sum.
#
# Seen: one random bfloat16 Llama, 400 pairs of answers of 12 tokens to one question: the two log-likelihoods of a pair are
# equal in 16 pairs by default, and in none with softmax_dtype=float32; by default all of these (-70 to -86) are multiples of
# half a nat.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate "lm-eval[hf]==0.4.13" 2>/dev/null

cat >"$folder/ties.py" <<'PYTHON'
import random

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(500)]
PAIRS, TOKENS = 400, 12

words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}, "<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
sizes = {"vocab_size": 502, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1, eos_token_id=1)).to(torch.bfloat16).eval()

random.seed(0)
questions = [" ".join(random.choices(WORDS, k=8)) for _ in range(PAIRS)]
answers = [" " + " ".join(random.choices(WORDS, k=TOKENS)) for _ in range(2 * PAIRS)]
asked = [(questions[number // 2], answer) for number, answer in enumerate(answers)]


def found(**options):
    """The log-likelihood of each answer, nats."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", **options)
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def ties(values):
    return sum(a == b for a, b in zip(values[::2], values[1::2], strict=True))


default, exact = found(), found(softmax_dtype="float32")
print(f"log-likelihoods from {min(exact):.1f} to {max(exact):.1f} nats")
print(f"default: {ties(default)} of {PAIRS} pairs are equal; e.g. {default[0]} and {default[1]}")
print(f"softmax_dtype=float32: {ties(exact)} of {PAIRS}; e.g. {exact[0]:.4f} and {exact[1]:.4f}")
assert all(value * 2 == int(value * 2) for value in default), "multiples of half a nat"
assert ties(default) >= PAIRS // 50, ties(default)
assert ties(exact) == 0, ties(exact)
PYTHON
"$folder/venv/bin/python" "$folder/ties.py"
