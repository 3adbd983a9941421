"""The builtin generator: the ranks of the run answer, each a share of every batch, with the weights that they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from uft_ds.architectures.facts import most_positions
from uft_ds.engine.engine import Engine
from uft_ds.evaluation.decoding import Decoding, Row
from uft_ds.evaluation.on_ranks import answers_on_ranks, may_continue_caches, policy_generates
from uft_ds.rollouts.answers import Answer, Answers, PolicyVersion, Question, Sampling, Unanswered
from uft_ds.streams.policy import base_of


class BuiltinGenerator:
    """Answers by the policy in the engine, on its own device; a `Generator`.

    The tokens of an answer depend on the policy, the prompt and the seed, not on what is answered beside it, the rank
    or the number of ranks: each answer draws by its seed alone. This holds up to the rounding of matmuls, whose last
    bits change with the shape of a batch: where two tokens are all but equally likely to be drawn, another one may
    come. torch's global generators are not used.
    """

    on_all_ranks = True
    needs_adapter = False

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        pad_id: int,
        tokens_per_batch: int,
        stop: Callable[[], None] = lambda: None,
        on_done: Callable[[int], None] = lambda done: None,
        whole: bool = False,
    ) -> None:
        """
        Args:
            pad_id: a token of the vocabulary that stands where a batch has nothing.
            tokens_per_batch: most tokens, prompts and answers, that a rank holds at once; a single answer may hold
                more.
            stop: called between batches, on every rank; raises `Stopped` on all of them or on none.
            on_done: called after each batch with the number of answers so far, of the questions that are answered.
            whole: under ZeRO-3, whether each rank holds all weights while it answers, instead of gathering each layer
                for each token. `room.fits_whole` says whether there is memory for it.
        """
        self._engine, self._sampling = engine, sampling
        self._how = Decoding(
            sampling.max_new_tokens,
            sampling.stop_token_ids,
            pad_id,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        self._tokens_per_batch, self._whole = tokens_per_batch, whole
        self._stop, self._on_done = stop, on_done
        self._continues_caches: bool | None = None
        base = base_of(engine.module.policy)
        self._most_positions = most_positions(base.config)

    @property
    def continues_caches(self) -> bool | None:
        """Whether a prompt is read once for all its answers: measured with the first prompt, None before."""
        return self._continues_caches

    def identity(self) -> Mapping[str, Any]:
        """What answers depend on besides policy, questions and seeds: sampling, versions, and the kind of device."""
        return {
            "generator": "builtin",
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_new_tokens": self._sampling.max_new_tokens,
            "stop_token_ids": sorted(self._sampling.stop_token_ids),
            "device": self._engine.device.type,
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
        }

    def publish(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to do: the policy is the one that is trained."""

    def answer(self, questions: list[Question]) -> list[Answers]:
        """The answers to each question, in order, on every rank. Every rank must call it, with the same questions.

        A question whose answers would not fit into the model's positions is unanswered.

        Raises:
            Stopped: the run is to stop. CheckFailed: the policy's logits are not finite.
        """
        reasons = [self._reason_against(question) for question in questions]
        asked = [question for question, reason in zip(questions, reasons, strict=True) if reason is None]
        rows = [Row(question.token_ids, seed) for question in asked for seed in question.seeds]
        found = iter(self._continued(rows) if rows else ())
        return [
            tuple(self._answer(next(found)) for _ in range(question.answers)) if reason is None else Unanswered(reason)
            for question, reason in zip(questions, reasons, strict=True)
        ]

    def _reason_against(self, question: Question) -> str | None:
        tokens, new_tokens = len(question.token_ids), self._how.max_new_tokens
        if not tokens:
            return "the prompt has no token"
        if self._most_positions is not None and tokens + new_tokens > self._most_positions:
            return (
                f"the prompt has {tokens} tokens, with {new_tokens} of an answer more than the {self._most_positions} "
                "positions of the model"
            )
        return None

    def _continued(self, rows: list[Row]) -> list[list[int]]:
        with policy_generates(self._engine, self._how, whole=self._whole):
            if self._continues_caches is None:
                self._continues_caches = may_continue_caches(self._engine, rows[0].token_ids)
            return answers_on_ranks(
                self._engine,
                rows,
                self._how,
                tokens_per_batch=self._tokens_per_batch,
                continues_caches=self._continues_caches,
                stop=self._stop,
                on_done=self._on_done,
            )

    def _answer(self, ids: list[int]) -> Answer:
        return Answer(tuple(ids), ended=ids[-1] in self._sampling.stop_token_ids)

    def close(self) -> None:
        """Nothing to end."""
