"""Interfaces, names, ports and limits."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from uft_ds.doctor import network
from uft_ds.doctor.network import (
    check_hostname,
    check_interfaces,
    check_limits,
    check_ports,
    check_shared_memory,
    check_store,
    is_on_many_nodes,
)

NAMES = ["lo", "eth0", "ib0"]


@pytest.mark.parametrize(
    ("variable", "asked", "state"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=eth", "problem"),  # an exact name
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", "problem"),  # none is left
        ("NCCL_SOCKET_IFNAME", "bond0", "problem"),
        ("NCCL_SOCKET_IFNAME", "bond,eth", "ok"),  # it takes what it finds
        ("NCCL_SOCKET_IFNAME", "=eth0,eth9", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth,ib", "problem"),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth0,ib0", "problem"),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth,ib", "ok"),
        ("NCCL_SOCKET_IFNAME", "bond0, eth0", "problem"),  # the space belongs to the name
        ("NCCL_SOCKET_IFNAME", "bond0,", "problem"),  # and nothing is no prefix
        ("GLOO_SOCKET_IFNAME", "eth0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "problem"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth9", "problem"),  # it opens every one
        ("GLOO_SOCKET_IFNAME", "^lo", "problem"),
        ("GLOO_SOCKET_IFNAME", "=eth0", "problem"),
    ],
)
def test_an_interface_that_is_asked_for_must_exist(variable: str, asked: str, state: str) -> None:
    """By each library's own rules."""
    (finding,) = check_interfaces({variable: asked}, NAMES)
    assert finding.state == state
    if state == "problem":
        assert "lo, eth0, ib0" in finding.found
        assert variable in finding.remedy


def test_a_list_says_which_is_missing() -> None:
    """All that gloo would fail on."""
    (finding,) = check_interfaces({"GLOO_SOCKET_IFNAME": "eth8,eth0,eth9"}, NAMES)
    assert "no 'eth8', 'eth9'; there are" in finding.found


GLOO = """
import json, os, sys
import torch.distributed as dist
for asked in json.loads(sys.argv[1]):
    os.environ["GLOO_SOCKET_IFNAME"] = asked
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.destroy_process_group()
    except RuntimeError:
        print("problem")
    else:
        print("ok")
"""


@pytest.mark.long
def test_gloo_agrees() -> None:
    """For this machine's interfaces, those without an address among them, torch's own process group is the judge."""
    there = [name for _, name in socket.if_nameindex()]
    asked = [*there, "nowhere9", "lo,lo", "lo,nowhere9", "lo, lo", " lo", "lo,", ",lo", "lo,,lo", "^lo", "=lo", "", "x"]
    said = subprocess.run(
        [sys.executable, "-c", GLOO, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    ).stdout.split()
    assert [check_interfaces({"GLOO_SOCKET_IFNAME": one})[0].state for one in asked] == said
    assert {"ok", "problem"} == set(said)


def test_interfaces_may_be_left_to_the_libraries() -> None:
    """This machine's are listed."""
    (finding,) = check_interfaces({})
    assert finding.state == "ok"
    assert "lo" in finding.found


@pytest.mark.parametrize(("many_nodes", "state"), [(False, "note"), (True, "problem")])
def test_a_name_that_means_another_machine(many_nodes: bool, state: str) -> None:
    """Unresolved, of nobody here, or (over many nodes) of every node itself: with the line that /etc/hosts needs."""

    def unresolved(name: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    lost = check_hostname(many_nodes=many_nodes, name="node7", resolve=unresolved)
    assert lost.state == state
    assert "node7 in /etc/hosts" in lost.remedy
    # 192.0.2.1 is for documentation: no machine has it.
    assert check_hostname(many_nodes=many_nodes, name="node7", resolve=lambda _: ["192.0.2.1"]).state == state
    loopback = check_hostname(many_nodes=many_nodes, name="node7", resolve=lambda _: ["127.0.0.1"])
    assert loopback.state == ("problem" if many_nodes else "ok")


@pytest.mark.long
def test_torchs_store_answers_here_and_not_at_an_unknown_name() -> None:
    """On 127.0.0.1; a name that cannot exist is a problem within the seconds given."""
    assert check_store(many_nodes=False).state == "ok"
    unknown = check_store(many_nodes=True, host="nowhere.invalid", seconds=2.0)
    assert unknown.state == "problem"
    assert "timed out" in unknown.found


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_PORT in use: a problem; the launchers' own in use: a note that names a free one."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        monkeypatch.setattr(network, "USUAL_PORT", port)
        note = check_ports()
        assert note.state == "note"
        assert f"{port}, the launchers' own, is in use" in note.found
        monkeypatch.setenv("MASTER_PORT", str(port))
        problem = check_ports()
        assert problem.state == "problem"
        assert f"port {port} is in use" in problem.found
    assert check_ports().state == "ok"
    monkeypatch.setenv("MASTER_PORT", "http")
    assert "expected a port number" in check_ports().found


def test_a_containers_shared_memory_is_too_small_for_nccl(tmp_path: Path) -> None:
    """64 MiB, and none at all, with two GPUs; a single one, or none, has nobody to send to."""
    states = {gpus: check_shared_memory(gpus, free=64 * 2**20).state for gpus in (0, 1, 2, 8)}
    assert states == {0: "ok", 1: "ok", 2: "problem", 8: "problem"}
    assert check_shared_memory(2, tmp_path / "nowhere").state == "problem"
    assert check_shared_memory(1, tmp_path / "nowhere").state == "note"
    assert check_shared_memory(2, free=2**33).state == "ok"


def test_limits_of_files_and_locked_memory(tmp_path: Path) -> None:
    """256 files are too few; locked memory matters where there is InfiniBand, and between nodes alone."""

    def limits(which: int) -> tuple[int, int]:
        return {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_MEMLOCK: (2**16, 2**16)}[which]

    (files,) = check_limits(many_nodes=True, get=limits, fast_network=tmp_path / "nowhere")
    assert (files.state, files.remedy) == ("problem", "ulimit -n 4096")
    (tmp_path / "mlx5_0").mkdir()
    for many_nodes, state in ((True, "problem"), (False, "note")):
        _, locked = check_limits(many_nodes=many_nodes, get=limits, fast_network=tmp_path)
        assert locked.state == state
        assert "ulimit -l unlimited" in locked.remedy
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    findings = check_limits(many_nodes=True, get=lambda _: unlimited, fast_network=tmp_path)
    assert [finding.state for finding in findings] == ["ok", "ok"]


def test_slurm_says_how_many_nodes_there_are() -> None:
    """One without Slurm."""
    assert not is_on_many_nodes({})
    assert not is_on_many_nodes({"SLURM_JOB_NUM_NODES": "1"})
    assert is_on_many_nodes({"SLURM_NNODES": "2"})
