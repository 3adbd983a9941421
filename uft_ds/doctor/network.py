"""Check what ranks need to connect to each other: interfaces, host name, ports, shared memory and process limits."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from uft_ds.doctor.finding import Finding, State
from uft_ds.errors import UserError
from uft_ds.host.ports import is_free
from uft_ds.host.world import given_port
from uft_ds.run.launch import master_port

USUAL_PORT = 29500
"""The default port of torchrun and deepspeed."""
_GIB = 2**30
_STORE_SECONDS = 10
_IMPORT_SECONDS = 60  # time to import torch from a slow file system
# Run in a separate process: a store that waits for an address aborts its process when that ends in the meantime.
_MEET = """
import os, sys
from datetime import timedelta
from torch.distributed import TCPStore

try:
    store = TCPStore(sys.argv[1], 0, None, True, timedelta(seconds=float(sys.argv[2])), wait_for_workers=False)
    store.set("uft", "doctor")
    print("ok" if store.get("uft") == b"doctor" else "another answer than was stored", flush=True)
except Exception as error:
    print(str(error).strip().splitlines()[0], flush=True)
os._exit(0)
"""


def is_on_many_nodes(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is in a Slurm job on several nodes."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    return nodes.isdigit() and int(nodes) > 1


def check_interfaces(environ: Mapping[str, str] = os.environ, names: Sequence[str] | None = None) -> list[Finding]:
    """Check the interfaces set for NCCL and gloo: with a missing one, every run fails at its first collective."""
    names = _interfaces() if names is None else names
    there = ", ".join(names) or "none"
    findings = []
    for variable, lack_of in (("NCCL_SOCKET_IFNAME", _nccl_lacks), ("GLOO_SOCKET_IFNAME", _gloo_lacks)):
        asked = environ.get(variable, "")
        if len(asked) < 2:  # both libraries ignore an empty value, and a value of a single character
            continue
        lack = lack_of(asked, names)
        if not lack:
            findings.append(Finding("network interface", "ok", f"{variable}={asked}"))
        else:
            found, remedy = f"{variable}={asked}: {lack}; there are: {there}", f"unset {variable}, or name one of these"
            findings.append(Finding("network interface", "problem", found, remedy))
    if not findings:
        remedy = "over many nodes set NCCL_SOCKET_IFNAME to the fast network's"
        return [Finding("network interface", "ok", f"left to NCCL and gloo; there are: {there}", remedy)]
    return findings


def check_hostname(
    *,
    many_nodes: bool,
    name: str | None = None,
    resolve: Callable[[str], list[str]] | None = None,
    is_local: Callable[[str], bool] | None = None,
) -> Finding:
    """Check that the host name resolves to an address of this machine: ranks of other nodes connect by this name."""
    name = name or socket.gethostname()
    resolve, is_local = resolve or _addresses, is_local or _can_listen
    bad: State = "problem" if many_nodes else "note"  # on one machine ranks meet on 127.0.0.1
    remedy = f"a line with this machine's address and {name} in /etc/hosts" + ("" if many_nodes else ", for many nodes")
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding("host name", bad, f"{name} does not resolve ({error})", remedy)
    if not any(is_local(address) for address in addresses):
        return Finding("host name", bad, f"{name} means {', '.join(addresses)}, no address of this machine", remedy)
    if many_nodes and all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        return Finding("host name", bad, f"{name} means {', '.join(addresses)}, which is every node itself", remedy)
    return Finding("host name", "ok", f"{name}: {', '.join(addresses)}")


def check_store(*, many_nodes: bool, host: str | None = None, seconds: float = _STORE_SECONDS) -> Finding:
    """Check torch's rendezvous store on a free port: at the host name for many nodes, otherwise at 127.0.0.1.

    The store resolves names in its own way: a name without an IPv6 line has been seen to fail where others resolve it.
    """
    host = host or (socket.gethostname() if many_nodes else "127.0.0.1")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _MEET, host, str(seconds)],
            capture_output=True, text=True, timeout=seconds + _IMPORT_SECONDS, check=False,
        )  # fmt: skip
        failure = done.stdout.strip() or f"ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        failure = "no answer"
    if failure == "ok":
        return Finding("torch's store", "ok", f"answers on {host}")
    remedy = f"IPv4 and ::ffff: lines for {host} in /etc/hosts" if many_nodes else "let processes connect on 127.0.0.1"
    return Finding("torch's store", "problem", f"{host}: {failure}", remedy)


def check_ports() -> Finding:
    """Check the ports: `uft train` uses MASTER_PORT or any free port; launchers started by hand use 29500."""
    try:
        port = master_port()
    except UserError as error:
        return Finding("ports", "problem", str(error), "unset MASTER_PORT, or give a free one")
    if not is_free(USUAL_PORT):
        remedy = f"--master-port {port} with torchrun or deepspeed by hand; `uft train` needs nothing"
        return Finding("ports", "note", f"{USUAL_PORT}, the launchers' own, is in use; {port} is free", remedy)
    return Finding("ports", "ok", f"{port} is free" + ("" if given_port() is None else " (MASTER_PORT)"))


def check_shared_memory(num_gpus: int, folder: Path = Path("/dev/shm"), free: int | None = None) -> Finding:
    """Check /dev/shm, through which NCCL moves data between GPUs without peer access; containers give it 64 MiB.

    num_gpus: number of GPUs of this machine; with fewer than two there is nothing to move.
    """
    if free is None:
        try:
            stat = os.statvfs(folder)
        except OSError:
            bad: State = "problem" if num_gpus > 1 else "note"
            return Finding("shared memory", bad, f"no {folder}", f"mount tmpfs on {folder}")
        free = stat.f_bavail * stat.f_frsize
    found = f"{free / _GIB:.2f} GiB free in {folder}"
    if free < _GIB and num_gpus > 1:
        return Finding("shared memory", "problem", found, "docker run --shm-size=8g, or --ipc=host")
    return Finding("shared memory", "ok", found)


def check_limits(
    *,
    many_nodes: bool,
    get: Callable[[int], tuple[int, int]] = resource.getrlimit,
    fast_network: Path = Path("/sys/class/infiniband"),
) -> list[Finding]:
    """Check the limits of open files and, if there is an RDMA network (InfiniBand, RoCE, EFA), of locked memory."""
    files, most = get(resource.RLIMIT_NOFILE)
    findings = [Finding("open files", "ok", f"at most {_said(files)}")]
    if files != resource.RLIM_INFINITY and files < 1024:
        findings = [Finding("open files", "problem", f"at most {files}, expected 1024", f"ulimit -n {_said(most)}")]
    if fast_network.is_dir() and any(fast_network.iterdir()):
        locked, _ = get(resource.RLIMIT_MEMLOCK)
        if locked == resource.RLIM_INFINITY:
            findings.append(Finding("locked memory", "ok", "unlimited"))
        else:
            bad: State = "problem" if many_nodes else "note"  # a single node does not use that network
            found = f"{locked / 2**20:.0f} MiB; NCCL between nodes fails with 'ibv_reg_mr' errors"
            remedy = "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK"
            findings.append(Finding("locked memory", bad, found, remedy))
    return findings


def _interfaces() -> list[str]:
    """Names of the interfaces with an address: NCCL ignores the others, gloo fails on them."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [name for name, found in psutil.net_if_addrs().items() if any(one.family in families for one in found)]


def _nccl_lacks(asked: str, names: Sequence[str]) -> str:
    """Why NCCL finds no interface for `asked`; empty if it finds one.

    Syntax `[^][=]name,name`: prefixes; with `=` exact names; with `^` all other interfaces. NCCL needs at least one.
    """
    is_excluded = asked.startswith("^")
    asked = asked.removeprefix("^")
    is_exact = asked.startswith("=")
    # A port may follow a name, as in NCCL_IB_HCA; it is ignored here. Spaces are part of the name.
    wanted = [part.partition(":")[0] for part in asked.removeprefix("=").split(",") if part]

    def is_named(name: str) -> bool:
        return any(name == one if is_exact else name.startswith(one) for one in wanted)

    if any(is_named(name) != is_excluded for name in names):
        return ""
    return "none is left" if is_excluded else "none has that name" if is_exact else "none begins with that"


def _gloo_lacks(asked: str, names: Sequence[str]) -> str:
    """Which interfaces of `asked` gloo lacks; empty if it lacks none.

    Syntax `name,name`: exact names, including spaces. gloo opens every one; torch accepts one trailing comma.
    """
    lacking = [part for part in asked.removesuffix(",").split(",") if part not in names]
    return f"no {', '.join(map(repr, lacking))}" if lacking else ""


def _addresses(name: str) -> list[str]:
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def _can_listen(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _said(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
