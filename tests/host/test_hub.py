"""What is said where the hub cannot be reached."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from uft_ds.data.rows.reading import find_data
from uft_ds.errors import UserError
from uft_ds.host.hub import NO_NETWORK, is_offline, no_network_hint, tell_retries_once
from uft_ds.streams.identity import local_folder
from uft_ds.streams.load import check_base


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The logger of the hub's client, as a command finds it."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "filters", [])
    return logger


def test_the_hubs_client_has_this_logger() -> None:
    """Its private module may be renamed, and all repetitions would be told again."""
    from huggingface_hub.utils import _http

    assert _http.logger.name == "huggingface_hub.utils._http"


def test_a_failed_request_is_told_once(client: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    """As the client logs six tries of one address and one of another; what it says of anything else stays."""
    tell_retries_once()
    tell_retries_once()
    with caplog.at_level(logging.WARNING, logger=client.name):
        for number, address in enumerate(["https://h/a"] * 6 + ["https://h/b"], start=1):
            client.warning(f"'[Errno -2] not known' thrown while requesting HEAD {address}")
            client.warning(f"Retrying in 1s [Retry {number}/5].")
        client.warning("something else")
    said = [f"https://h/{name}: '[Errno -2] not known'; trying again for half a minute ({NO_NETWORK})" for name in "ab"]
    assert caplog.messages == [*said, "something else"]


def test_what_the_hub_did_not_give_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By each of the three ways to it; not where the hub is not asked, as in all tests."""
    monkeypatch.chdir(tmp_path)
    asks = (
        lambda: find_data("some/rows", None),
        lambda: local_folder("some/model", None),
        lambda: check_base("some/model", None),
    )
    for is_asked in (False, True):
        if is_asked:
            monkeypatch.delenv("HF_HUB_OFFLINE")  # the hub's own libraries read it once, when they are imported
        for ask in asks:
            with pytest.raises(UserError) as refused:
                ask()
            assert (f"; {NO_NETWORK}" in str(refused.value)) == is_asked, refused.value


def test_the_hub_is_not_asked_if_the_variable_says_so() -> None:
    """By the words that the hub's client takes for true."""
    assert is_offline({"HF_HUB_OFFLINE": "on"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"})
    assert no_network_hint({"HF_HUB_OFFLINE": "1"}) == ""
    assert no_network_hint({}) == f"; {NO_NETWORK}"
