"""A model on a server: the values of the model in memory, and what is said where the server cannot do it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import needs
import pytest
import requests
import torch
from asking import evaluated, items_of, stub_tasks, uft_eval
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.batches import BatchSize
from uft_ds.evaluation.harness.endpoint import EndpointModel
from uft_ds.evaluation.harness.model import CausalModel

needs.installed("tenacity", "pip install '.[eval]' brings it")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Completions(ThreadingHTTPServer):
    """OpenAI's completions of a model, greedy, one prompt after the other. gives_echo: log-probs of prompts too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.gives_echo, self.status, self.lock = True, 200, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @torch.no_grad()
    def choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        if body.get("echo"):
            logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [None, *(float(row[token]) for row, token in zip(logps, ids[1:], strict=False)), -1.0]
            top = [None, *({"best": float(row.max())} for row in logps[:-1]), {"best": -1.0}]
            return {"index": index, "text": "", "logprobs": {"token_logprobs": own, "top_logprobs": top}}
        new: list[int] = []
        while len(new) < body["max_tokens"] and not any(
            stop in self.tokenizer.decode(new) for stop in body["stop"] or []
        ):
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        text = self.tokenizer.decode(new)
        for stop in body["stop"] or []:
            text = text.split(stop)[0]
        return {"index": index, "text": text}


class Handler(BaseHTTPRequestHandler):
    server: Completions

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 400 if body.get("echo") and not self.server.gives_echo else self.server.status
        if status == 200:
            with self.server.lock:
                choices = [self.server.choice(index, ids, body) for index, ids in enumerate(body["prompt"])]
            said: dict[str, Any] = {"choices": choices[::-1]}  # in any order
        else:
            said = {"error": "echo is not supported"}
        sent = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tiny_qwen2: Path) -> Iterator[Completions]:
    with Completions(tiny_qwen2) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def test_a_server_has_the_values_of_the_model_in_memory(server: Completions, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Choices and answers; its address and name are recorded."""
    suite = stub_tasks(tmp_path / "tasks")
    evaluated(tmp_path / "here", tiny_qwen2, "--suite", suite)
    found = evaluated(tmp_path / "there", tiny_qwen2, "--suite", suite, "--url", server.url, "--served-as", "tiny")
    assert items_of(tmp_path / "there") == items_of(tmp_path / "here")
    assert found.settings["server"] == [server.url, "tiny"]


@pytest.mark.parametrize("template", [False, True], ids=["plain", "template"])
def test_a_first_token_is_the_same_on_a_server(tiny_qwen2: Path, template: bool) -> None:
    """Of a tokenizer that puts one before every text: a template's text has none but its own, as in training."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokenizer.bos_token = "<|endoftext|>"
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    here = CausalModel(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2), tokenizer, BatchSize(rows=1), lambda name, measure: measure(),
        has_template=template,
    )  # fmt: skip
    there = EndpointModel("http://127.0.0.1:9/v1", "tiny", tokenizer, positions=512, rows=1, has_template=template)
    messages = [{"role": "user", "content": "How many?"}]
    text = here.harness.apply_chat_template(messages) if template else "How many?"
    trained = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert here.harness.tok_encode(text) == there.harness.tok_encode(text) == [*([] if template else [first]), *trained]


def test_tasks_that_a_server_cannot_score_are_named_before_the_start(
    server: Completions, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Those that it can answer run."""
    server.gives_echo = False
    pick, say = stub_tasks(tmp_path / "tasks").split(",")
    options = ("--url", server.url, "--served-as", "tiny", "--out", tmp_path / "out")
    refused = uft_eval(tiny_qwen2, "--suite", f"{pick},{say}", *options)
    assert "gives no log-probs of prompts" in str(refused.exception)
    assert "score choices: pick; leave them out" in str(refused.exception)
    assert uft_eval(tiny_qwen2, "--suite", say, *options, "--overwrite").exit_code == 0


def test_what_a_server_says_of_an_error_ends_behind_a_word(tiny_qwen2: Path) -> None:
    """On one line, whatever the length of its page."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    there = EndpointModel("http://127.0.0.1:9/v1", "x", tokenizer, positions=512, rows=1, has_template=True)
    response = requests.Response()
    response.status_code, response._content = 422, b"no such\nmodel " * 99

    def refused() -> None:
        raise requests.HTTPError(response=response)

    with pytest.raises(UserError, match=r"answers 422: (no such model )+no \.\.\.$"):
        there._asked(refused)


def test_a_server_that_is_gone_is_no_bad_input(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Exit code 3; an address that is none is bad input."""
    say = stub_tasks(tmp_path / "tasks").split(",")[1]
    gone = uft_eval(
        tiny_qwen2, "--suite", say, "--url", "http://127.0.0.1:9/v1", "--served-as", "x", "--out", tmp_path / "o"
    )
    assert "cannot be asked" in str(gone.exception)
    assert getattr(gone.exception, "exit_code", None) == 3
    none = uft_eval(tiny_qwen2, "--suite", say, "--url", "ftp://x", "--served-as", "x", "--out", tmp_path / "p")
    assert "neither http:// nor https://" in str(none.exception)
