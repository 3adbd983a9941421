"""The routes of a vLLM server that a run uses. vLLM itself is not imported: it has an environment of its own.

GET  /health  /version  /v1/models             POST /v1/load_lora_adapter  /v1/unload_lora_adapter  /v1/completions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.web import NoReply, UnderWay, exchange, parsed_url, words_of
from uft_ds.rollouts.adapter_versions import MAX_RANKS

_QUESTION_SECONDS = 15.0
_LOAD_SECONDS = 300.0
"""An adapter of some GB from a shared disk, while the server answers others."""
_BUSY = (408, 425, 429)
"""Besides all of 500 and above: what may be another time."""


@dataclass(frozen=True)
class Server:
    """Where answers are asked for.

    url: such as http://node1:8000, with or without /v1. model: the name by which the server calls the base; None: the
    only one that it has. key: of the server's --api-key; never in a message or a file.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Served:
    """A line of /v1/models. root: the folder that it was loaded from. parent: the base of an adapter; None: a base.

    max_length: most tokens of prompt and answer together; None if the server does not say.
    """

    name: str
    root: str | None
    parent: str | None
    max_length: int | None


class Unavailable(Exception):
    """The server gives no answer now; another time it may.

    status: of HTTP; None if there was no answer at all.
    """

    def __init__(self, reason: str, *, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class TooLate(Exception):
    """The server took the request and did not answer in time."""


class Refused(Exception):
    """The server understood the request and does not do it. words: what it says."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}{f' ({words})' if words else ''}")
        self.status, self.words = status, words


class Client:
    """Asks a server; it may be used by several threads at once."""

    def __init__(self, server: Server, under_way: UnderWay | None = None) -> None:
        """
        Args:
            under_way: cuts its requests off; None: nothing does.
        Raises:
            UserError: the URL is none, or the key is.
        """
        self.url = _root_of(server.url)
        if server.key is not None and not (server.key and server.key.isascii() and server.key.isprintable()):
            # A header could not hold it, and the error would show it.
            raise UserError("generator: the key is empty, or holds a line break or another character that no key has")
        self._server = server
        self._under_way = under_way or UnderWay()

    def within(self, under_way: UnderWay) -> Client:
        """The same client, whose requests another thread can cut off."""
        return Client(self._server, under_way)

    def pause(self, seconds: float) -> None:
        """Sleep between two requests. Raises Unavailable if they have been cut off."""
        try:
            self._under_way.pause(seconds)
        except NoReply as error:
            raise Unavailable(str(error)) from None

    def check_health(self) -> None:
        """Raises Unavailable unless the server says that it works."""
        try:
            self._asked("GET", "/health", seconds=_QUESTION_SECONDS)
        except Refused as error:  # of what answers in its place while it starts
            raise Unavailable(f"/health: {error}", status=error.status) from None

    def version(self) -> str | None:
        """The server's version; None if it does not tell."""
        try:
            found = _object(self._asked("GET", "/version", seconds=_QUESTION_SECONDS)).get("version")
        except (Refused, CheckFailed):
            return None
        return found if isinstance(found, str) else None

    def dtype(self) -> str | None:
        """The type in which the base computes. Servers tell it only in their mode for development; None otherwise."""
        try:
            config = _object(self._asked("GET", "/server_info?config_format=json", seconds=_QUESTION_SECONDS))
            found = config["vllm_config"]["model_config"]["dtype"]
        except (Refused, CheckFailed, Unavailable, LookupError, TypeError):
            return None
        return found.removeprefix("torch.") if isinstance(found, str) else None

    def models(self) -> list[Served]:
        """What the server answers by: bases and adapters."""
        try:
            lines = _object(self._asked("GET", "/v1/models", seconds=_QUESTION_SECONDS)).get("data")
        except Refused as error:
            raise CheckFailed(f"{self.url}/v1/models: {error}; is it a vLLM server?") from None
        try:
            assert isinstance(lines, list)
            return [Served(str(one["id"]), *map(one.get, ("root", "parent", "max_model_len"))) for one in lines]
        except (AssertionError, LookupError, TypeError, AttributeError):
            raise CheckFailed(f"{self.url}/v1/models: no list of models") from None

    def base(self) -> Served:
        """The base model that adapters are put on.

        Raises:
            UserError: the server has no such model, or several and none was named.
        """
        bases = [one for one in self.models() if one.parent is None]
        named = [one for one in bases if self._server.model in (None, one.name)]
        if len(named) == 1:
            return named[0]
        asked = "no name of the base model is given" if self._server.model is None else f"{self._server.model!r} given"
        raise UserError(
            f"{self.url}: {asked}, and the server has {', '.join(repr(one.name) for one in bases) or 'no model'}; "
            "expected the name of one of its base models (vLLM's --served-model-name)"
        )

    def load(self, name: str, path: Path) -> None:
        """Make the server answer by the adapter in a folder under a name of its own.

        Raises:
            Unavailable, Refused: 404 if it has no such route or no such folder, 400 if it has the name already.
        """
        self._asked("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, seconds=_LOAD_SECONDS)

    def unload(self, name: str) -> None:
        """Make the server forget an adapter's name. Raises as `load`, 404 if it has no such name."""
        self._asked("POST", "/v1/unload_lora_adapter", {"lora_name": name}, seconds=_QUESTION_SECONDS)

    def complete(self, body: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """The reply to a completion request.

        Raises:
            Unavailable, TooLate, Refused. CheckFailed: it is no JSON object. UserError: the key is not accepted.
        """
        return _object(self._asked("POST", "/v1/completions", body, seconds=seconds))

    def _asked(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float,
    ) -> bytes:
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "uft_ds"}
        if self._server.key is not None:
            headers["Authorization"] = f"Bearer {self._server.key}"
        data = None if body is None else json.dumps(body).encode()
        url = self.url + path
        try:
            reply = exchange(method, url, data, headers=headers, seconds=seconds, under_way=self._under_way)
        except NoReply as error:
            if error.is_late and path == "/v1/completions":
                raise TooLate(str(error)) from None
            raise Unavailable(str(error)) from None
        if reply.status == 200:
            return reply.body
        # Before it is shortened, or the first half of a key might stay.
        words = words_of(
            reply.body if self._server.key is None else reply.body.replace(self._server.key.encode(), b"***")
        )
        if reply.status >= 500 or reply.status in _BUSY:
            raise Unavailable(str(Refused(reply.status, words)), status=reply.status)
        if reply.status in (401, 403):
            raise UserError(f"{url}: {Refused(reply.status, words)}: the key is missing or not accepted (--api-key)")
        raise Refused(reply.status, words)


def start_command(model: str, *, rank: int, dtype: str | None = None) -> str:
    """How a server for a run is started."""
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {' '.join(start_arguments(model, rank=rank, dtype=dtype))}"
    )


def start_arguments(
    model: str,
    *,
    rank: int,
    dtype: str | None = None,
    revision: str | None = None,
    served_model: str | None = None,
    max_length: int | None = None,
) -> list[str]:
    """What `vllm serve` is given for a run. docs/online_generators.md says why.

    Args:
        rank: of the adapter; the server gets the next larger one that vLLM takes.
        served_model: the name by which the server shall call the base.
        max_length: most tokens of a prompt and its answer together.
    """
    given = {
        "--dtype": dtype,
        "--revision": revision,
        "--served-model-name": served_model,
        "--max-model-len": max_length,
    }
    return [
        model,
        *(word for flag, value in given.items() if value is not None for word in (flag, str(value))),
        "--enable-lora",
        *("--max-lora-rank", str(next((one for one in MAX_RANKS if one >= rank), rank))),
        *("--max-loras", "1", "--max-cpu-loras", "2", "--generation-config", "vllm"),
    ]


def _root_of(url: str) -> str:
    """The URL up to where routes begin."""
    expected = "expected a URL such as http://127.0.0.1:8000"
    try:
        parts = parsed_url(url)
    except ValueError as error:
        raise UserError(f"generator: found {url!r}, {expected} ({error})") from None
    if parts.username or parts.password:
        raise UserError("generator: the URL holds a user name or password; give a key instead")
    if parts.query or parts.fragment:
        raise UserError(f"generator: found {url!r}, {expected}, without a query: routes are added to it")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
        if not isinstance(value, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise CheckFailed(f"generator: the server's reply is no JSON object: {body[:80]!r}; is it a vLLM?") from None
    return value
