"""A model on a server with OpenAI's completions, such as vLLM, asked by lm-evaluation-harness's own client.

Prompts are sent as token ids of the source's own tokenizer. Choices are scored by log-probs of the prompt (`echo` with
`logprobs`), which not every server gives: that is asked before the first question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.harness.batches import CutQuestions, grouped
from uft_ds.host.terminal import in_one_line
from uft_ds.host.web import parsed_url

ROWS = 16
"""Prompts of a request, which a server answers at the same time."""
_SECONDS = 600
_PROBE = Instance("loglikelihood", {}, ("One two three", " four"), 0)


class EndpointModel:
    """Answers batches of requests by a server."""

    def __init__(
        self, url: str, name: str, tokenizer: Any, *, positions: int | None, rows: int, has_template: bool
    ) -> None:
        """
        Args:
            url: up to `/v1`. name: of the model there. positions: of the model; None: any number.
            has_template: whether prompts are written by a chat template, which writes the first token itself.
        Raises:
            UserError: the URL is none.
        """
        try:
            parsed_url(url)
        except ValueError as error:
            raise UserError(f"--url: {url!r}: {error}; expected one such as http://127.0.0.1:8000/v1") from None
        self.harness = LocalCompletionsAPI(
            base_url=f"{url.rstrip('/').removesuffix('/completions')}/completions",
            tokenizer_backend=None,
            model=name,
            batch_size=rows,
            max_length=positions or 1 << 30,
            timeout=_SECONDS,
        )
        self.harness.tokenizer, self.harness.tokenizer_backend = tokenizer, "huggingface"
        self.harness.tokenized_requests = True
        # The harness's client for servers adds no first token by itself, its model in memory does.
        first = tokenizer("a")["input_ids"][0]
        self.harness.add_bos_token = first == tokenizer.bos_token_id and not has_template
        self._cut = CutQuestions()
        self._rows, self._url = rows, url

    def check_scores_prompts(self, tasks: Iterable[str]) -> None:
        """Refuse a server that gives no log-probs of a prompt, where tasks need them.

        Args:
            tasks: that need them.
        Raises:
            UserError: names the tasks. CheckFailed: the server cannot be reached.
        """
        names = sorted(tasks)
        if not names:
            return
        try:
            ((logp, _),) = self._asked(lambda: self.harness.loglikelihood([_PROBE], disable_tqdm=True))
        except (UserError, KeyError, TypeError, ValueError, AssertionError) as error:
            raise UserError(
                f"--url: {self._url} gives no log-probs of prompts ({in_one_line(str(error), 200)}), by which "
                f"these tasks score choices: {', '.join(names)}; leave them out, or take a server such as vLLM"
            ) from None
        if not logp < 0:
            raise UserError(f"--url: {self._url} gives {logp} for the log-prob of a text; expected a number below 0")

    @property
    def cut_prompts(self) -> Counter[str]:
        """As of `model.CausalModel`."""
        return self._cut.by_task()

    def batches(self, kind: str, requests: Seq[Instance]) -> list[list[int]]:
        """The places of the requests that one request to the server holds."""
        for request in requests:
            if self._is_cut(kind, request):
                self._cut.add(request.task_name, request.doc_id)
        alike = grouped([repr(sorted(request.args[1].items())) for request in requests]) if kind == "generate_until" \
            else [list(range(len(requests)))]  # fmt: skip
        return [places[start : start + self._rows] for places in alike for start in range(0, len(places), self._rows)]

    def answer(self, kind: str, requests: Seq[Instance], places: Seq[int]) -> list[Any]:
        """The answers to the requests at these places.

        Raises:
            UserError: the server refuses them. CheckFailed: it cannot be reached, or gives no answer.
        """
        asked = [requests[place] for place in places]
        found = list(self._asked(lambda: getattr(self.harness, kind)(asked, disable_tqdm=True)))
        if len(found) != len(asked) or LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER in found:
            raise CheckFailed(f"--url: {self._url} left out an answer; what was answered is kept")
        return found

    def _is_cut(self, kind: str, request: Instance) -> bool:
        longest = self.harness.max_length
        if kind == "generate_until":
            longest -= int(normalize_gen_kwargs(dict(request.args[1]), 256)["max_gen_toks"])
            return len(self.harness.tok_encode(request.args[0])) > longest
        return len(self.harness.tok_encode("".join(request.args))) > longest

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except OSError as error:  # what the client raises are some of these
            response = getattr(error, "response", None)
            if response is not None and 400 <= response.status_code < 500:
                said = in_one_line(response.text, 200)
                raise UserError(f"--url: {self._url} answers {response.status_code}: {said}") from None
            reason = in_one_line(str(error), 200)
            raise CheckFailed(f"--url: {self._url} cannot be asked ({reason}); the same command goes on") from None
