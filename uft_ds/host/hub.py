"""Hugging Face's hub: whether it may be asked, and what is said where it cannot be reached."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

NO_NETWORK = "without a network set HF_HUB_OFFLINE=1: errors come at once"
_TRUE = {"1", "ON", "YES", "TRUE"}
_LOGGER = "huggingface_hub.utils._http"
"""The logger of the hub's client, which tells each failed request and each of its five repetitions."""


def is_offline(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether HF_HUB_OFFLINE is set: then a name that is not cached is an error at once, without a wait."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def no_network_hint(environ: Mapping[str, str] = os.environ) -> str:
    """The end of a message about something that the hub did not give; empty where the hub is not asked."""
    return "" if is_offline(environ) else f"; {NO_NETWORK}"


def tell_retries_once() -> None:
    """From now on a request that fails is told once, with what to do, and its repetitions are not."""
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(found, _Retries) for found in logger.filters):
        logger.addFilter(_Retries())


class _Retries(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Retrying in "):
            return False
        failed = re.match(r"(.*) thrown while requesting \w+ (\S+)", message, re.DOTALL)
        if failed is None:
            return True
        reason, address = failed.groups()
        is_new = address not in self._told
        self._told.add(address)
        record.msg, record.args = f"{address}: {reason}; trying again for half a minute ({NO_NETWORK})", ()
        return is_new
