"""One rank works, the others wait: as long as it takes, where a collective would time out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore

from uft_ds.errors import UserError

T = TypeVar("T")
_POLL_SECONDS = 0.2
_DONE = "done"

logger = logging.getLogger("uft_ds")


def while_others_wait(name: str, work: Callable[[], T], *, works: bool) -> T | None:
    """Run `work` on the rank that `works`; the others return when it is done, or raise what it raised.

    Whoever waits only asks the launcher's store for the result; if the worker dies, the launcher ends them all.

    Args:
        name: of this occasion: the same on the ranks that belong together, never used twice.
    Raises:
        UserError: as `work` raised it; any other exception is a RuntimeError on those that waited.
    """
    store = _launchers_store()
    # torchrun keeps one store for all its restarts.
    key = f"uft_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
    if works:
        try:
            result = work()
        except Exception as error:
            is_users = isinstance(error, UserError)
            if not is_users:
                logger.exception("unexpected error")
            store.set(key, json.dumps([is_users, str(error) if is_users else f"{type(error).__name__}: {error}"]))
            raise
        store.set(key, _DONE)
        return result
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    outcome = store.get(key).decode("utf-8")
    if outcome != _DONE:
        is_users, message = json.loads(outcome)
        raise UserError(message) if is_users else RuntimeError(message)
    return None


def _launchers_store() -> TCPStore:
    """The store by which the ranks found each other."""
    return TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(minutes=5),
    )
