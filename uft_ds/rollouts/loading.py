"""Make a server answer by an adapter's folder, and tell apart what may be another time from what will never be."""

from __future__ import annotations

from pathlib import Path

from uft_ds.errors import CheckFailed, GeneratorLost, UserError
from uft_ds.rollouts.server import Client, Refused, Unavailable
from uft_ds.scoring.pacing import back_off_seconds

_TRIES = 4
"""How often a server that is well is asked to take an adapter: a shared disk may show a new folder late."""
_NO_SUCH_ROUTE = "Not Found"


def is_without_route(error: Refused) -> bool:
    """Whether a server does not know the address itself; vLLM's own 404 says what cannot be found."""
    return error.status == 404 and error.words == _NO_SUCH_ROUTE


def load(client: Client, name: str, path: Path) -> None:
    """Load an adapter under a name. A name that the server has already, from the same folder, is as good.

    Raises:
        Unavailable: the server is not well. GeneratorLost: it is, and does not take the adapter. UserError: it does not
            take any. CheckFailed: it has another adapter under this name, or does not understand the request.
    """
    problem: Exception | None = None
    for tries in range(1, _TRIES + 1):
        try:
            return client.load(name, path)
        except Refused as error:
            if is_without_route(error):
                raise UserError(
                    f"{client.url}: it takes no adapters while it runs; start it with --enable-lora and with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
                ) from None
            if error.status == 400:
                return _check_same(client, name, path, error)
            if error.status != 404:
                raise CheckFailed(f"generator: {client.url} does not load {path}: {error}") from None
            problem = error
        except Unavailable as error:
            if error.status is None:
                raise
            client.check_health()
            problem = error
        if tries < _TRIES:
            client.pause(back_off_seconds(tries, None))
    raise GeneratorLost(
        f"generator: {client.url} is well and does not take the adapter {path}: {problem} (asked {_TRIES} times). Is "
        "the folder on a disk that the server sees under the same path, may it read it, and was the server started "
        "with --enable-lora and a large enough --max-lora-rank?"
    )


def _check_same(client: Client, name: str, path: Path, error: Refused) -> None:
    """The server has the name already: from an earlier life of this run, or else of another one."""
    roots = [one.root for one in client.models() if one.name == name]
    if not roots:
        raise CheckFailed(f"generator: {client.url} does not load {path}: {error}")
    if roots != [str(path)]:
        raise CheckFailed(
            f"generator: {client.url} has an adapter {name!r} already, from {roots[0]}, not from {path}: another run "
            "of this name uses the server, or this one was moved. Give the run another name, or start the server again"
        )
