"""Let some ranks work while the others wait without a time limit, where a collective would time out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore

from uft_ds.errors import UserError
from uft_ds.host.world import launcher_environment

T = TypeVar("T")
_POLL_SECONDS = 0.2
_FAILED = "failed"

logger = logging.getLogger("uft_ds")


def while_others_wait(name: str, work: Callable[[], T], *, works: bool) -> T | None:
    """Run `work` on the ranks where `works` is true; every rank returns once all of them have finished.

    The waiting ranks poll the launcher's store; if a working rank dies, the launcher ends all ranks. Every rank must
    call it.

    Args:
        name: identifies this call in the store; never used twice.
    Returns:
        The result of `work`; None on the waiting ranks.
    Raises:
        UserError: raised on all ranks if `work` raised it; any other exception is a RuntimeError on the other ranks.
    """
    store = _launchers_store()
    result: T | None = None
    if works:
        try:
            result = work()
        except Exception as error:
            is_users = isinstance(error, UserError)
            if not is_users:
                logger.exception("unexpected error")
            message = str(error) if is_users else f"{type(error).__name__}: {error}"
            store.set(_key(_FAILED), json.dumps([is_users, message]))
            raise
    # Every rank counts itself when it has arrived, so the count reaches the world size only after all work is done.
    store.add(_key(name), 1)
    while store.add(_key(name), 0) < launcher_environment().world_size:
        if store.check([_key(_FAILED)]):
            is_users, message = json.loads(store.get(_key(_FAILED)))
            raise UserError(message) if is_users else RuntimeError(message)
        time.sleep(_POLL_SECONDS)
    return result


def _key(name: str) -> str:
    # torchrun keeps one store for all its restarts, so keys of an earlier start would still be there.
    return f"uft_ds/{launcher_environment().restart_count}/{name}"


def _launchers_store() -> TCPStore:
    """A client of the launcher's store, which the ranks used for their rendezvous."""
    launched = launcher_environment()
    assert launched.master_port is not None, "`init_distributed` has checked that it is set"
    return TCPStore(launched.master_address, launched.master_port, is_master=False, timeout=timedelta(minutes=5))
