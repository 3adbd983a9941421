"""One answer of a server: the request, with all that answers depend on, and a strict reading of the reply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uft_ds.errors import CheckFailed
from uft_ds.rollouts.answers import Answer, Sampling

_ROUNDING_NATS = 1e-3
"""How far above 0 a log-prob may be by the server's rounding."""
_FLOOR_NATS = -9999.0
"""What vLLM writes for a log-prob of minus infinity, which JSON does not have."""


class Aborted(Exception):
    """The server has ended the request before the answer was whole, as it does when it is shut down."""


def request_body(model: str, prompt: tuple[int, ...], *, seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request for one answer by token ids. Nothing is left to the server's defaults, which the model's
    generation_config.json may set.

    Args:
        model: the name of the adapter's version; it is the salt of the prefix cache, too.
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "n": 1,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # or the model's own end token would end answers, too, whatever the stop tokens are
        "logprobs": 0,
        "return_token_ids": True,
        "cache_salt": model,
    }


def answer_in(
    reply: Mapping[str, Any], *, model: str, prompt: tuple[int, ...], sampling: Sampling, vocab_size: int
) -> Answer:
    """The answer in a reply, if it is whole and says what it must.

    Raises:
        CheckFailed: it is not; says what was found. Aborted: the server has ended the request.
    """
    try:
        (choice,) = reply["choices"]
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, echoed = choice["finish_reason"], choice.get("prompt_token_ids")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise _wrong(
            "it has not one choice with token_ids, logprobs and finish_reason; vLLM 0.22 or newer has"
        ) from None
    if reason == "abort":
        raise Aborted("the server has aborted the request")
    if reply.get("model", model) != model:
        raise _wrong(f"it answers by {_shown(reply['model'])}, {model!r} was asked for")
    if echoed is not None and echoed != list(prompt):
        raise _wrong("it answers another prompt: its prompt_token_ids are not the ones that were sent")
    if not isinstance(ids, list) or not ids:
        raise _wrong(f"token_ids are {_shown(ids)}, expected at least one")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise _wrong(f"token_ids hold {_shown(token)}, expected whole numbers from 0 to {vocab_size - 1}")
    if not isinstance(logps, list) or len(logps) != len(ids):
        number = len(logps) if isinstance(logps, list) else "no"
        raise _wrong(f"it has {len(ids)} token_ids and {number} log-probs")
    for logp in logps:
        if not _is_logp(logp):
            raise _wrong(
                f"a log-prob is {_shown(logp)}, expected a finite number not above 0; are weights or adapter NaN?"
            )
    return Answer(tuple(ids), _ended(ids, reason, sampling), tuple(map(float, logps)))


def _is_logp(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and _FLOOR_NATS < value <= _ROUNDING_NATS


def _ended(ids: list[int], reason: Any, sampling: Sampling) -> bool:
    """Whether the answer ends in a stop token.

    A stop token in the last place that is allowed may be called either reason.
    """
    stops = set(sampling.stop_token_ids)
    if stops & set(ids[:-1]):
        raise _wrong("it goes on after a stop token")
    if len(ids) > sampling.max_new_tokens:
        raise _wrong(f"it has {len(ids)} tokens, at most {sampling.max_new_tokens} were asked for")
    ended = ids[-1] in stops
    if reason == "stop" and not ended:
        raise _wrong(f"finish_reason is 'stop', and its last token {ids[-1]} is none of {sorted(stops)}")
    if reason == "length" and len(ids) < sampling.max_new_tokens:
        raise _wrong(
            f"finish_reason is 'length' after {len(ids)} tokens, and {sampling.max_new_tokens} were allowed; start the "
            "server with a larger --max-model-len"
        )
    if reason not in ("stop", "length"):
        raise _wrong(f"finish_reason is {_shown(reason)}, expected 'stop' or 'length'")
    return ended


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _wrong(problem: str) -> CheckFailed:
    return CheckFailed(f"generator: a reply of the server cannot be used: {problem}")
