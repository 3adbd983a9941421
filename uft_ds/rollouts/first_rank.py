"""Work of rank 0 alone, for which the other ranks wait without a time limit, and whose outcome all ranks share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

from uft_ds.engine.engine import Engine
from uft_ds.engine.waiting import while_others_wait
from uft_ds.errors import CheckFailed, Stopped, UserError

T = TypeVar("T")

logger = logging.getLogger("uft_ds")


def on_first_rank(engine: Engine, name: str, work: Callable[[], T]) -> T:
    """Run `work` on rank 0; its value, or its exception, is that of every rank. Every rank must call it.

    Args:
        name: identifies this call; never used twice in a start of a run.
    Raises:
        UserError, CheckFailed or Stopped: as `work` raised it. RuntimeError: `work` raised another exception.
    """
    own = while_others_wait(f"rollouts/{name}", lambda: _tried(work), works=engine.rank == 0)
    value, problem = engine.from_first(own or (None, None))
    if problem is not None:
        raise problem
    return cast(T, value)


def _tried(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except UserError as error:
        return None, UserError(str(error), by_all=True)
    except CheckFailed as error:
        return None, CheckFailed(str(error), by_all=True)
    except Stopped as stopped:
        return None, Stopped(str(stopped), by_all=True)
    except Exception as error:
        logger.exception("unexpected error")
        return None, RuntimeError(f"{type(error).__name__}: {error}")
