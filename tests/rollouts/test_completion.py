"""A server's reply is read strictly: every way in which it can be wrong is a refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from uft_ds.errors import CheckFailed
from uft_ds.rollouts.answers import Answer, Sampling
from uft_ds.rollouts.completion import Aborted, answer_in, request_body

PROMPT = (11, 12)
SAMPLING = Sampling(1.0, 1.0, 4, (2, 7))
REPLY: dict[str, Any] = {
    "model": "m",
    "choices": [
        {
            "token_ids": [5, 6, 2],
            "logprobs": {"token_logprobs": [-0.5, -1, 0.0]},
            "finish_reason": "stop",
            "prompt_token_ids": [11, 12],
        }
    ],
}


def read(reply: dict[str, Any]) -> Answer:
    return answer_in(reply, model="m", prompt=PROMPT, sampling=SAMPLING, vocab_size=10)


def with_choice(**changes: Any) -> dict[str, Any]:
    reply = copy.deepcopy(REPLY)
    reply["choices"][0] |= changes
    return reply


def with_tokens(ids: list[Any], reason: str, logps: list[Any] | None = None) -> dict[str, Any]:
    return with_choice(token_ids=ids, finish_reason=reason, logprobs={"token_logprobs": logps or [-1.0] * len(ids)})


def test_a_right_reply_is_an_answer() -> None:
    """Ended and cut; with integers for log-probs; without the optional fields."""
    assert read(REPLY) == Answer((5, 6, 2), True, (-0.5, -1.0, 0.0))
    assert read(with_tokens([5, 6, 8, 9], "length")) == Answer((5, 6, 8, 9), False, (-1.0,) * 4)
    assert read(with_tokens([2], "stop")) == Answer((2,), True, (-1.0,))
    bare = with_choice()
    del bare["model"], bare["choices"][0]["prompt_token_ids"]
    assert read(bare).ended


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stop_token_in_the_last_place_ends_an_answer(reason: str) -> None:
    """Versions of vLLM look at the length or at the token first."""
    assert read(with_tokens([5, 6, 8, 7], reason)).ended


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({}, "one choice"),
        ({"choices": []}, "one choice"),
        ({"choices": REPLY["choices"] * 2}, "one choice"),
        ({"choices": "x"}, "one choice"),
        ({"choices": [None]}, "one choice"),
        (with_choice(logprobs=None), "one choice"),
        (with_choice(logprobs={"token_logprobs": None}), "3 token_ids and no log-probs"),
        (with_choice(token_ids=None), "at least one"),
        (with_choice(token_ids=[]), "at least one"),
        (with_choice(token_ids="562"), "at least one"),
        (with_tokens([5, 10, 2], "stop"), "hold 10"),
        (with_tokens([5, -1, 2], "stop"), "hold -1"),
        (with_tokens([5, 6.0, 2], "stop"), r"hold 6\.0"),
        (with_tokens([5, True, 2], "stop"), "hold True"),
        (with_tokens([5, "6", 2], "stop"), "hold '6'"),
        (with_tokens([5, 6, 2], "stop", [-1.0, -1.0]), "3 token_ids and 2 log-probs"),
        (with_tokens([5, 6, 2], "stop", [-1.0, None, -1.0]), "log-prob is None"),
        (with_tokens([5, 6, 2], "stop", [-1.0, float("nan"), -1.0]), "log-prob is nan"),
        (with_tokens([5, 6, 2], "stop", [-1.0, float("-inf"), -1.0]), "log-prob is -inf"),
        (with_tokens([5, 6, 2], "stop", [-1.0, -9999.0, -1.0]), "log-prob is -9999"),
        (with_tokens([5, 6, 2], "stop", [-1.0, 0.01, -1.0]), r"log-prob is 0\.01"),
        (with_tokens([5, 6, 2], "stop", [-1.0, "-1", -1.0]), "log-prob is '-1'"),
        (with_tokens([5, 6, 2], "stop", [-1.0, True, -1.0]), "log-prob is True"),
        (with_tokens([5, 6, 8], "stop"), "its last token 8 is none of"),
        (with_tokens([5, 6, 2], "length"), "after 3 tokens"),
        (with_tokens([5, 6], "length"), "after 2 tokens, and 4 were allowed"),
        (with_tokens([5, 2, 6, 8], "length"), "after a stop token"),
        (with_tokens([5, 5, 5, 5, 5], "length"), "5 tokens, at most 4"),
        (with_choice(finish_reason=None), "finish_reason is None"),
        (with_choice(finish_reason="tool_calls"), "finish_reason is 'tool_calls'"),
        (with_choice(prompt_token_ids=[11]), "another prompt"),
        (REPLY | {"model": "base"}, "answers by 'base', 'm' was asked for"),
    ],
)
def test_a_wrong_reply_is_refused(reply: dict[str, Any], words: str) -> None:
    """In words that say what was found."""
    with pytest.raises(CheckFailed, match=words):
        read(reply)


def test_an_aborted_request_is_no_answer() -> None:
    """It is asked again, whatever it holds."""
    with pytest.raises(Aborted):
        read(with_choice(finish_reason="abort", token_ids=[]))


def test_the_salt_is_the_versions_name() -> None:
    """So no two versions share a prefix, whatever the server's cache goes by."""
    one, other = (request_body(name, PROMPT, seed=3, sampling=SAMPLING) for name in ("v1", "v2"))
    assert (one["cache_salt"], other["cache_salt"]) == ("v1", "v2")
    assert {key for key in one if one[key] != other[key]} == {"model", "cache_salt"}
