"""What ranks need to find and reach each other: interfaces, a name, ports, and the limits of this process."""

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
"""torchrun's and deepspeed's, where none is given."""
_GIB = 2**30
_STORE_SECONDS = 10
_IMPORT_SECONDS = 60  # of torch, from a slow file system
# In a process of its own: a store that waits for an address aborts the process that would end meanwhile.
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
    """Within a job of Slurm's over more nodes than one."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    return nodes.isdigit() and int(nodes) > 1


def check_interfaces(environ: Mapping[str, str] = os.environ, names: Sequence[str] | None = None) -> list[Finding]:
    """Interfaces that NCCL and gloo are told to use: one that does not exist ends every run at its first collective."""
    names = _interfaces() if names is None else names
    there = ", ".join(names) or "none"
    findings = []
    for variable, lack_of in (("NCCL_SOCKET_IFNAME", _nccl_lacks), ("GLOO_SOCKET_IFNAME", _gloo_lacks)):
        asked = environ.get(variable, "")
        if len(asked) < 2:  # both libraries pass over an empty value, and one of a single character
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
    """Ranks of other nodes reach this one by its name: it must mean an address of this machine."""
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
    """torch's store, by which ranks meet, on a free port: by this machine's name over many nodes, else on 127.0.0.1.

    It looks names up in its own way: one without an IPv6 line has been seen to fail where others resolve it.
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
    """`uft train` takes MASTER_PORT, or any free port; launchers by hand take 29500."""
    try:
        port = master_port()
    except UserError as error:
        return Finding("ports", "problem", str(error), "unset MASTER_PORT, or give a free one")
    if not is_free(USUAL_PORT):
        remedy = f"--master-port {port} with torchrun or deepspeed by hand; `uft train` needs nothing"
        return Finding("ports", "note", f"{USUAL_PORT}, the launchers' own, is in use; {port} is free", remedy)
    return Finding("ports", "ok", f"{port} is free" + ("" if given_port() is None else " (MASTER_PORT)"))


def check_shared_memory(num_gpus: int, folder: Path = Path("/dev/shm"), free: int | None = None) -> Finding:
    """NCCL moves data between GPUs through it, where they cannot reach each other; containers give it 64 MiB.

    num_gpus: of this machine; with fewer than two there is nothing to move.
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
    """Open files, and locked memory where there is a network that reads memory itself: InfiniBand, RoCE, EFA."""
    files, most = get(resource.RLIMIT_NOFILE)
    findings = [Finding("open files", "ok", f"at most {_said(files)}")]
    if files != resource.RLIM_INFINITY and files < 1024:
        findings = [Finding("open files", "problem", f"at most {files}, expected 1024", f"ulimit -n {_said(most)}")]
    if fast_network.is_dir() and any(fast_network.iterdir()):
        locked, _ = get(resource.RLIMIT_MEMLOCK)
        if locked == resource.RLIM_INFINITY:
            findings.append(Finding("locked memory", "ok", "unlimited"))
        else:
            bad: State = "problem" if many_nodes else "note"  # within a node nothing goes over that network
            found = f"{locked / 2**20:.0f} MiB; NCCL between nodes fails with 'ibv_reg_mr' errors"
            remedy = "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK"
            findings.append(Finding("locked memory", bad, found, remedy))
    return findings


def _interfaces() -> list[str]:
    """With an address: NCCL passes over the others, gloo fails on them."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [name for name, found in psutil.net_if_addrs().items() if any(one.family in families for one in found)]


def _nccl_lacks(asked: str, names: Sequence[str]) -> str:
    """`[^][=]name,name`: prefixes, exact names with `=`, all others with `^`. It takes what it finds, and needs one."""
    is_excluded = asked.startswith("^")
    asked = asked.removeprefix("^")
    is_exact = asked.startswith("=")
    # A port may follow a name, as for NCCL_IB_HCA; it has no meaning here. Spaces belong to the name.
    wanted = [part.partition(":")[0] for part in asked.removeprefix("=").split(",") if part]

    def is_named(name: str) -> bool:
        return any(name == one if is_exact else name.startswith(one) for one in wanted)

    if any(is_named(name) != is_excluded for name in names):
        return ""
    return "none is left" if is_excluded else "none of that name" if is_exact else "none begins so"


def _gloo_lacks(asked: str, names: Sequence[str]) -> str:
    """`name,name`: exact names, spaces included. It opens every one; torch forgives a comma at the end alone."""
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
