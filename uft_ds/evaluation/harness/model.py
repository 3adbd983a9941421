"""A model in memory that answers requests of lm-evaluation-harness, by the harness's own code for Hugging Face models.

Prompts, tokens, truncation, stop sequences and log-probs are the harness's. Ours are the batches, that logits are
computed where a continuation is scored and not for its whole prompt, and that the prompt of a question is read once for
all its choices.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from uft_ds.errors import UserError
from uft_ds.evaluation.cache import are_alike, cache_is_exact, new_cache
from uft_ds.evaluation.harness.batches import MOST_ROWS, BatchSize, CutQuestions, cut, grouped, same_beginning

Encoded = tuple[Any, list[int], list[int]]
"""A request, and the tokens of its context and of its continuation."""
Agreed = Callable[[str, Callable[[], int]], int]
"""Measures a number once for all ranks: its name, and how."""

CPU_TOKENS = 1024
"""Of a batch on a CPU, with padding. SmolLM2-135M took 49.7 CPU seconds with about as many, 58.1 with four times as
many."""
SHARED_TOKENS = 64
"""From so many tokens on that all choices of a question begin with, they are read once; a batch is then a question."""
_KEPT_FREE = 0.9
_UNLIMITED = 1 << 30


class CausalModel:
    """Answers batches of requests."""

    def __init__(
        self, model: Any, tokenizer: Any, size: BatchSize | None, agreed: Agreed, *, has_template: bool = False
    ) -> None:
        """
        Args:
            size: None: what fits into a GPU's memory, `CPU_TOKENS` on a CPU, and prompts are read once for all choices
                of a question. With a size the rows are computed as the harness does it, to the last bit.
            has_template: whether prompts are written by a chat template, which writes the first token itself.
        """
        self.harness = _Harness(model, tokenizer, has_template=has_template)
        self._cut = CutQuestions()
        self._size, self._agreed = size, agreed
        self._encoded: list[Encoded] = []

    @property
    def cut_prompts(self) -> Counter[str]:
        """Questions whose prompt lost its beginning, by task, of the requests so far."""
        return self._cut.by_task()

    def batches(self, kind: str, requests: Seq[Instance]) -> list[list[int]]:
        """The places of the requests that are answered together.

        Raises:
            UserError: a task asks for more new tokens than the model has positions.
        """
        if kind == "loglikelihood":
            return self._of_continuations(requests)
        if kind == "generate_until":
            return self._of_prompts(requests)
        return [[place] for place in range(len(requests))]

    def answer(self, kind: str, requests: Seq[Instance], places: Seq[int]) -> list[Any]:
        """The answers to the requests at these places of the list that `batches` was called with last.

        Raises:
            UserError: the GPU's memory is too small for a batch.
        """
        try:
            if kind == "loglikelihood":
                return self.harness.scored([self._encoded[place] for place in places])
            return list(getattr(self.harness, kind)([requests[place] for place in places], disable_tqdm=True))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch-size: {len(places)} requests do not fit into the GPU's memory together "
                f"({str(error).split('.')[0]}); give a smaller number"
            ) from None

    def _of_continuations(self, requests: Seq[Instance]) -> list[list[int]]:
        self._encoded = [self.harness.encoded(*request.args) for request in requests]
        ids = [tuple(context + continuation) for _, context, continuation in self._encoded]
        for request, row in zip(requests, ids, strict=True):
            if len(row) > self.harness.max_length + 1:
                self._cut.add(request.task_name, request.doc_id)
        # As the harness does: continuations that differ in their last token alone share a row; the longest come first.
        rows = [
            sorted(row, key=lambda place: -len(self._encoded[place][2])) for row in grouped([row[:-1] for row in ids])
        ]
        rows.sort(key=lambda row: (-len(ids[row[0]]), ids[row[0]]))
        widths = {row[0]: max(1, min(len(ids[row[0]]) - 1, self.harness.max_length)) for row in rows}
        size = self._size_for("loglikelihood", max(widths.values(), default=1))
        together, alone = self._by_shared_prompt(requests, rows, ids)
        # On a CPU all choices of a question at once: what they do not share is short.
        of_question = size if self.harness.device.type == "cuda" else BatchSize(rows=MOST_ROWS)
        batches = [batch for question in together for batch in cut(question, widths, of_question)]
        return batches + cut(alone, widths, size)

    def _by_shared_prompt(
        self, requests: Seq[Instance], rows: list[list[int]], ids: Seq[tuple[int, ...]]
    ) -> tuple[list[list[list[int]]], list[list[int]]]:
        """The rows of each question whose choices begin alike, and all other rows, which stay in their order.

        Args:
            ids: of each request, its context and its continuation.
        """
        if self._size is not None:
            return [], rows
        names = [(requests[row[0]].task_name, requests[row[0]].doc_id) for row in rows]
        questions = [[rows[place] for place in places] for places in grouped(names) if len(places) > 1]
        questions = [one for one in questions if self._shared([ids[row[0]] for row in one]) >= SHARED_TOKENS]
        if not questions:
            return [], rows
        longest = [list(ids[row[0]][:-1]) for row in questions[0]]
        # By all ranks alike, or their batches would not be the same.
        self.harness.shares = bool(self._agreed("caches are exact", lambda: int(self.harness.can_share(longest))))
        if not self.harness.shares:
            return [], rows
        in_questions = {row[0] for question in questions for row in question}
        return questions, [row for row in rows if row[0] not in in_questions]

    def _shared(self, rows: list[tuple[int, ...]]) -> int:
        """Tokens that rows begin with alike; 0 if one is too long and loses its beginning."""
        if max(map(len, rows)) > self.harness.max_length + 1:
            return 0
        return same_beginning([row[:-1] for row in rows])

    def _of_prompts(self, requests: Seq[Instance]) -> list[list[int]]:
        lengths = [len(self.harness.tok_encode(request.args[0])) for request in requests]
        widths, batches = {}, []
        for place, request in enumerate(requests):
            new = int(normalize_gen_kwargs(dict(request.args[1]), self.harness.max_gen_toks)["max_gen_toks"])
            room = self.harness.max_length - new
            if room <= 0:
                raise UserError(
                    f"{request.task_name}: asks for up to {new} new tokens, and the model has "
                    f"{self.harness.max_length} positions; lower --max-new-tokens, or leave the task out"
                )
            if lengths[place] > room:
                self._cut.add(request.task_name, request.doc_id)
            widths[place] = min(lengths[place], room) + new
        size = self._size_for("generate_until", max(widths.values(), default=1))
        for alike in grouped([repr(sorted(request.args[1].items())) for request in requests]):
            rows = sorted(([place] for place in alike), key=lambda row: (-lengths[row[0]], requests[row[0]].args[0]))
            batches += cut(rows, widths, size)
        return batches

    def _size_for(self, kind: str, width: int) -> BatchSize:
        if self._size is not None:
            return self._size
        if self.harness.device.type != "cuda":
            return BatchSize(tokens=CPU_TOKENS)
        return BatchSize(tokens=self._agreed(f"{kind} tokens", lambda: self.harness.tokens_that_fit(width)))


class _Harness(HFLM):
    """The harness's model, which computes the logits of the last tokens alone.

    Its own code finds a row's continuation by the distance from the end, so it reads shorter logits as they are.
    """

    def __init__(self, model: Any, tokenizer: Any, *, has_template: bool) -> None:
        # One batch at a time is handed over, whole. Log-probs in float32: in bfloat16, the harness's choice for such a
        # model, answers of different likelihood come out equal (findings/lm_eval_bfloat16_ties.sh).
        super().__init__(
            model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=_UNLIMITED,
            softmax_dtype=torch.float32,
            add_bos_token=False if has_template else None,
        )
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kept = 0
        self.shares = False
        """Whether tokens that all rows of a batch begin with are read once."""

    @torch.no_grad()
    def can_share(self, rows: list[list[int]]) -> bool:
        """Whether rows may continue the cache of what they begin with: measured with these, by token ids.

        The longest question is asked, because a sliding window is passed by a long prompt alone.
        """
        if not self._can_keep or not cache_is_exact(self.model, rows[0], self.device):
            return False
        rows = rows[:2]
        shared, width = same_beginning(rows), max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        kept = width - min(shared, width - 1)
        whole, continued = self.model(ids, logits_to_keep=kept).logits, self._continued(ids, width - kept, kept)
        own = [len(row) - (width - kept) for row in rows]  # what follows is padding
        found = [torch.cat([row[:n] for row, n in zip(of, own, strict=True)]) for of in (whole, continued)]
        return are_alike(found[1], found[0], next(self.model.parameters()).dtype)

    def encoded(self, context: str, continuation: str) -> Encoded:
        """As `TemplateLM.loglikelihood` encodes them."""
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        ids = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        before, after = ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])
        return ((context, continuation), before, after)

    def scored(self, batch: list[Encoded]) -> list[Any]:
        """The log-prob of each continuation, nats, and whether it is the likeliest one."""
        width = max(self._width(row) for row in batch)
        # A shorter row ends before the padding, so its continuation lies that much further from the end.
        self._kept = max(width - self._width(row) + len(row[2]) for row in batch) if self._can_keep else 0
        try:
            return list(self._loglikelihood_tokens(batch, disable_tqdm=True))
        finally:
            self._kept = 0

    def tokens_that_fit(self, width: int) -> int:
        """Tokens of the largest batch of the longest rows that the GPU's memory holds, with the logits of all of them.

        Where rows of one batch differ much in length, most logits of a row are kept.
        """

        @find_executable_batch_size(starting_batch_size=MOST_ROWS)
        def rows_that_fit(batch_size: int) -> int:
            ids = torch.ones((batch_size, width), dtype=torch.long, device=self.device)
            torch.log_softmax(self._model_call(ids), dim=-1, dtype=self.softmax_dtype)
            return batch_size

        try:
            rows = int(rows_that_fit())
        finally:
            torch.cuda.empty_cache()
        return max(width, int(rows * width * _KEPT_FREE))

    def _width(self, row: Encoded) -> int:
        return int(min(len(row[1]) + len(row[2]) - 1, self.max_length))

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        if not self._kept:
            return super()._model_call(inps, attn_mask, labels)
        shared = min(same_beginning(inps.tolist()), inps.shape[1] - self._kept) if self.shares else 0
        with torch.no_grad():
            if shared < SHARED_TOKENS or len(inps) == 1:
                return self.model(inps, logits_to_keep=self._kept).logits
            return self._continued(inps, shared, self._kept)

    def _continued(self, ids_BT: torch.Tensor, shared: int, kept: int) -> Any:
        """Logits of the last `kept` tokens, where the first `shared` ones, the same in all rows, are read once."""
        cache = new_cache(self.model, room=ids_BT.shape[1])
        self.model(ids_BT[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(torch.zeros(len(ids_BT), dtype=torch.long, device=ids_BT.device))
        return self.model(ids_BT[:, shared:], past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
