"""A port for ranks to meet at is free, and stays so until they listen."""

import socket
from pathlib import Path

import pytest

from uft_ds.host import ports
from uft_ds.host.ports import free_port, is_free


@pytest.fixture
def outgoing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes what the kernel would say."""
    path = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "_OUTGOING", path)
    return path


@pytest.mark.parametrize(("first", "last"), [(32768, 29_499), (25_000, 24_999)])
def test_no_outgoing_connection_takes_it(outgoing: Path, first: int, last: int) -> None:
    """It is below the range of which the kernel takes theirs, and not the launchers' own."""
    outgoing.write_text(f"{first}\t60999\n")
    found = {free_port() for _ in range(50)}
    assert min(found) >= 20_000
    assert max(found) <= last
    assert len(found) > 40, "two that choose at once hardly ever choose the same"


def test_where_none_is_below(outgoing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then one of the kernel's choice is better than none; so it is where all of them are taken."""
    outgoing.write_text("1024\t65535\n")
    looked_at: list[int] = []
    monkeypatch.setattr(ports, "is_free", looked_at.append)
    assert is_free(free_port())
    assert not looked_at
    outgoing.write_text("32768\t60999\n")
    assert free_port() not in looked_at
    assert len(looked_at) == 100


def test_one_that_is_listened_at_is_not_free() -> None:
    """On whichever address; afterwards it is."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        assert not is_free(port)
    assert is_free(port)
