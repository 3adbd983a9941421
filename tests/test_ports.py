"""A port for ranks to meet at is free, and stays so until they listen."""

import socket
from pathlib import Path

import pytest

from uft_ds import ports
from uft_ds.ports import free_port, is_free


def test_no_outgoing_connection_takes_it() -> None:
    """It is below the range of which the kernel takes theirs."""
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {free_port() for _ in range(50)}
    assert max(found) < first_outgoing
    assert len(found) > 40, "two that choose at once hardly ever choose the same"


@pytest.mark.parametrize("outgoing", ["1024\t65535\n", "20000 60999\n"])
def test_where_none_is_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outgoing: str) -> None:
    """Then one of the kernel's choice is better than none."""
    (tmp_path / "range").write_text(outgoing)
    monkeypatch.setattr(ports, "_OUTGOING", tmp_path / "range")
    assert is_free(free_port())


def test_one_that_is_listened_at_is_not_free() -> None:
    """On whichever address; afterwards it is."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        assert not is_free(port)
    assert is_free(port)
