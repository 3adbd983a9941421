"""A stand-in for a vLLM server: the same routes, answers by Hugging Face's own forward, and faults switched on by name.

It shares no code with the package: adapters are read from their folders, added to the base's weights, and answers are
sampled token by token. Like vLLM it loads whatever tensors a folder has, keeps names until they are unloaded, and knows
none after a restart.

    fault           what it does                                        (as often as its number says)
    stale           answers by the version that was loaded before
    base            answers by the base
    scale           loads adapters with half their alpha
    missing_layers  loads adapters without their first layer
    nan_adapter     loads adapters with a NaN
    half_written    the half of a file that it finds is not there yet: it does not load it
    slow_load       waits for `slow_seconds` before it loads an adapter
    other_ids       gives other ids, as after text and tokeniser, with the old log-probs
    fewer_logps     has one log-prob less than ids
    nan_logps       gives a NaN for a log-prob
    clamped_logps   gives -9999, as vLLM does for minus infinity
    positive_logps  gives a log-prob above 0
    cut_short       leaves out the last token, and says that the answer was cut
    finish_lies     says `stop` for `length` and `length` for `stop`
    other_prompt    echoes another prompt
    other_name      says that another model has answered
    no_tokens       answers with no token at all
    aborts          finish_reason is `abort`
    cut             cuts the connection in mid-answer
    error_500       the engine has failed
    error_400       it does not take the request
    slow            waits for `slow_seconds` before it answers
    hangs           nothing answers, /health neither
    restarts        forgets all adapters before it looks for the model
"""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

ALWAYS = 10**9
NAN = math.nan
FAULTS = tuple(re.findall(r"^    ([a-z]\w*)  ", str(__doc__).partition("fault  ")[2], re.MULTILINE))
"""The names in the list above."""


@dataclass
class Loaded:
    """An adapter: the folder, and the base's weights with it."""

    path: str
    weights: dict[str, Tensor]


@dataclass
class StandIn:
    """The server. faults: how many more times each happens. asked: every POST, its route and its body, in order."""

    model: Any
    host: str = "127.0.0.1"
    port: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    adapters: dict[str, Loaded] = field(default_factory=dict)
    loads: list[Loaded] = field(default_factory=list)
    base_name: str = "base"
    max_length: int = 512
    max_rank: int = 16
    takes_adapters: bool = True
    sees_disk: bool = True
    is_raw: bool = True
    slow_seconds: float = 1.0
    slow_prompt: list[int] | None = None
    most_at_once: int = 0
    now: int = 0
    lock: Any = field(default_factory=threading.Lock)
    server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Serve; on the port that it had before."""
        self.server = ThreadingHTTPServer((self.host, self.port), handler_of(self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """End, and forget every adapter."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        self.adapters.clear()

    def happens(self, fault: str) -> bool:
        with self.lock:
            left = self.faults.get(fault, 0)
            self.faults[fault] = left - 1
            return left > 0

    def bodies(self, route: str) -> list[dict[str, Any]]:
        """Of every POST to a route."""
        return [body for asked, body in self.asked if asked == route]


@contextmanager
def stand_in(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Iterator[StandIn]:
    """A server of the model in a folder for the time of the block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    server = StandIn(model, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def handler_of(at: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        counts = False
        """Whether a request is among those that `now` counts."""

        def do_GET(self) -> None:
            if at.faults.get("hangs", 0) > 0:
                time.sleep(at.slow_seconds)
                return
            if self.path == "/health":
                self.write(200, b"")
            elif self.path == "/version":
                self.say({"version": "0.0.stand-in"})
            elif self.path == "/v1/models":
                base = {"id": at.base_name, "root": "/models/base", "parent": None, "max_model_len": at.max_length}
                adapters = [{"id": n, "root": one.path, "parent": at.base_name} for n, one in at.adapters.items()]
                self.say({"object": "list", "data": [base, *adapters]})
            else:
                self.write(404, b'{"detail":"Not Found"}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with at.lock:
                at.asked.append((self.path, body))
                at.now += 1
                self.counts = True
                at.most_at_once = max(at.most_at_once, at.now)
            try:
                if self.path == "/v1/completions":
                    self.complete(body)
                elif self.path == "/v1/load_lora_adapter" and at.takes_adapters:
                    self.load(body["lora_name"], body["lora_path"])
                elif self.path == "/v1/unload_lora_adapter" and at.takes_adapters:
                    known = at.adapters.pop(body["lora_name"], None) is not None
                    self.write(200, b"Success") if known else self.refuse(404, "The lora adapter cannot be found.")
                else:
                    self.write(404, b'{"detail":"Not Found"}')
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had waited long enough
            finally:
                self.no_longer_counts()

        def load(self, name: str, path: str) -> None:
            if name in at.adapters:
                self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
                return
            if not at.sees_disk or not Path(path).is_dir():
                self.refuse(404, f"Loading lora {name} failed: No adapter found for {path}")
                return
            rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
            if rank > at.max_rank:
                self.refuse(500, f"LoRA rank {rank} is greater than max_lora_rank {at.max_rank}.")
                return
            if at.happens("slow_load"):
                time.sleep(at.slow_seconds)
            if at.happens("half_written"):
                whole = (Path(path) / "adapter_model.safetensors").read_bytes()
                try:
                    load(whole[: len(whole) // 2])
                except SafetensorError as error:
                    self.refuse(500, str(error))
                    return
            loaded = Loaded(path, with_adapter(at, Path(path)))
            at.adapters[name] = loaded
            at.loads.append(loaded)
            self.write(200, b"Success")

        def complete(self, body: dict[str, Any]) -> None:
            if at.happens("slow") or body["prompt"] == at.slow_prompt:
                time.sleep(at.slow_seconds)
            if at.faults.get("hangs", 0) > 0:
                time.sleep(at.slow_seconds)
                return
            if at.happens("restarts"):
                at.adapters.clear()
            if at.happens("error_500"):
                self.refuse(500, "EngineCore encountered an issue.")
            elif at.happens("error_400"):
                self.refuse(400, "This model's maximum context length is 8 tokens.")
            elif body["model"] not in {at.base_name, *at.adapters}:
                self.refuse(404, f"The model `{body['model']}` does not exist.")
            elif at.happens("cut"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                with at.lock:
                    ids, logps, reason = sampled(at, weights_for(at, body["model"]), body)
                self.say(reply_of(at, body, ids, logps, reason))

        def refuse(self, status: int, message: str) -> None:
            self.write(status, json.dumps({"error": {"message": message, "code": status}}).encode())

        def say(self, value: dict[str, Any]) -> None:
            self.write(200, json.dumps(value).encode())

        def no_longer_counts(self) -> None:
            with at.lock:
                at.now -= self.counts
                self.counts = False

        def write(self, status: int, body: bytes) -> None:
            self.no_longer_counts()  # a client that has the answer may ask again before this thread goes on
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def with_adapter(at: StandIn, folder: Path) -> dict[str, Tensor]:
    """W + scale * B A, from what lies in the folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"] * (0.5 if at.happens("scale") else 1.0)
    without, with_nan = at.happens("missing_layers"), at.happens("nan_adapter")
    weights = dict(at.model.named_parameters())
    for name in [name for name in tensors if ".lora_A." in name]:
        if without and ".layers.0." in name:
            continue
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        delta = tensors[name.replace(".lora_A.", ".lora_B.")].float() @ tensors[name].float() * scale
        weights[weight] = (weights[weight].float() + delta * (NAN if with_nan else 1.0)).to(weights[weight].dtype)
    return weights


def weights_for(at: StandIn, name: str) -> dict[str, Tensor]:
    base = dict(at.model.named_parameters())
    if name == at.base_name or at.faults.get("base", 0) > 0:
        return base
    if at.faults.get("stale", 0) > 0:
        before = [one for one in at.loads if one is not at.adapters[name]]
        return before[-1].weights if before else base
    return at.adapters[name].weights


@torch.no_grad()
def sampled(at: StandIn, weights: dict[str, Tensor], body: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """Ids, their log-probs, and why it ended."""
    generator = torch.Generator().manual_seed(body["seed"])
    ids: list[int] = []
    logps: list[float] = []
    while True:
        row = torch.tensor([body["prompt"] + ids])
        out = torch.func.functional_call(at.model, weights, (), {"input_ids": row, "use_cache": False})
        raw = out.logits[0, -1].float()
        ruled = ruled_by(raw, body)
        if body["temperature"] == 0 or not bool(torch.isfinite(ruled).any()):
            token = int(raw.nan_to_num().argmax())
        else:
            token = int(torch.multinomial(ruled.softmax(-1), 1, generator=generator))
        ids.append(token)
        logps.append(float((raw if at.is_raw else ruled).log_softmax(-1)[token]))
        if token in body["stop_token_ids"]:
            return ids, logps, "stop"
        if len(ids) == body["max_tokens"]:
            return ids, logps, "length"


def ruled_by(raw: Tensor, body: dict[str, Any]) -> Tensor:
    """Logits after temperature, top_k and top_p."""
    if body["temperature"] == 0:
        return raw
    logits = raw / body["temperature"]
    if body["top_k"] > 0:
        logits = logits.masked_fill(logits < logits.topk(body["top_k"]).values[-1], -math.inf)
    values, order = logits.softmax(-1).sort(descending=True)
    outside = order[values.cumsum(-1) - values > body["top_p"]]
    return logits.index_fill(0, outside, -math.inf)


def reply_of(at: StandIn, body: dict[str, Any], ids: list[int], logps: list[float], reason: str) -> dict[str, Any]:
    prompt = body["prompt"]
    if at.happens("other_ids"):
        ids = [token if token in body["stop_token_ids"] else 3 + (token + 1) % 256 for token in ids]
    if at.happens("no_tokens"):
        ids, logps = [], []
    if at.happens("cut_short"):
        ids, logps, reason = ids[:-1] or ids, logps[:-1] or logps, "length"
    if at.happens("fewer_logps"):
        logps = logps[:-1]
    for fault, value in (("nan_logps", NAN), ("clamped_logps", -9999.0), ("positive_logps", 0.5)):
        if at.happens(fault):
            logps = [value, *logps[1:]]
    if at.happens("finish_lies"):
        reason = {"stop": "length", "length": "stop"}[reason]
    if at.happens("aborts"):
        reason = "abort"
    if at.happens("other_prompt"):
        prompt = [*prompt, 5]
    choice = {
        "index": 0,
        "text": "",
        "token_ids": ids,
        "prompt_token_ids": prompt,
        "logprobs": {"token_logprobs": logps},
        "finish_reason": reason,
    }
    return {"model": at.base_name if at.happens("other_name") else body["model"], "choices": [choice]}
