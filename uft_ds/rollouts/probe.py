"""Questions to a server whose answers are known to be the same each time: one token of a fixed prompt."""

from __future__ import annotations

from uft_ds.rollouts.answers import Answer, Sampling
from uft_ds.rollouts.completion import Aborted, answer_in, request_body
from uft_ds.rollouts.server import Client, Unavailable

SECONDS = 120.0
"""Longest that a probe may take: the first request to an adapter may compile kernels."""
_PROMPT_TOKENS = 8


def probe_prompt(vocab_size: int) -> tuple[int, ...]:
    """Tokens from all over the vocabulary, so that no model is sure of what follows."""
    return tuple(vocab_size * number // (_PROMPT_TOKENS + 1) for number in range(1, _PROMPT_TOKENS + 1))


def likeliest(client: Client, model: str, vocab_size: int, *, tokens: int = 1) -> Answer:
    """The likeliest tokens after the fixed prompt, which servers choose at temperature 0.

    Raises:
        CheckFailed: the reply cannot be used. Unavailable, TooLate, Refused: as `Client.complete`.
    """
    return _asked(client, model, vocab_size, Sampling(0.0, 1.0, tokens, ()))


def takes_logps_before_sampling(client: Client, model: str, vocab_size: int) -> bool:
    """Whether log-probs are the model's own (vLLM's --logprobs-mode raw_logprobs), not those of the distribution that
    is sampled: if only the likeliest token may be drawn, its log-prob is 0 there. Raises as `likeliest`."""
    (logp,) = _asked(client, model, vocab_size, Sampling(1.0, 1.0, 1, ()), top_k=1).logps or ()
    return logp < -1e-6


def _asked(client: Client, model: str, vocab_size: int, sampling: Sampling, top_k: int = -1) -> Answer:
    prompt = probe_prompt(vocab_size)
    body = request_body(model, prompt, seed=0, sampling=sampling) | {"top_k": top_k}
    reply = client.complete(body, seconds=SECONDS)
    try:
        return answer_in(reply, model=model, prompt=prompt, sampling=sampling, vocab_size=vocab_size)
    except Aborted as error:
        raise Unavailable(str(error)) from None
