"""What ranks need to find and reach each other: interfaces, a name, ports, and the limits of this process."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from uft_ds.doctor.finding import Finding, State
from uft_ds.errors import UserError
from uft_ds.launch import master_port

SOCKET_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
USUAL_PORT = 29500
"""torchrun's and deepspeed's, where none is given."""
_GIB = 2**30
_STORE_SECONDS = 10


def is_on_many_nodes(environ: Mapping[str, str] = os.environ) -> bool:
    """Within a job of Slurm's over more nodes than one."""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    return nodes.isdigit() and int(nodes) > 1


def check_interfaces(environ: Mapping[str, str] = os.environ, names: Sequence[str] | None = None) -> list[Finding]:
    """Interfaces that NCCL and gloo are told to use: one that does not exist ends every run at its first collective."""
    names = [name for _, name in socket.if_nameindex()] if names is None else names
    there = ", ".join(names) or "none"
    findings = []
    for variable in SOCKET_VARIABLES:
        asked = environ.get(variable)
        if asked is None:
            continue
        if _chosen(asked, names, by_prefix=variable.startswith("NCCL")):
            findings.append(Finding("network interface", "ok", f"{variable}={asked}"))
        else:
            remedy = f"unset {variable}, or name one of these"
            findings.append(Finding("network interface", "problem", f"{variable}={asked}; there are: {there}", remedy))
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
    failure: list[str] = ["no answer"]

    def meet() -> None:
        from torch.distributed import TCPStore

        try:
            store = TCPStore(host, 0, None, True, timedelta(seconds=seconds), wait_for_workers=False)
            store.set("uft", "doctor")
            failure[0] = "" if store.get("uft") == b"doctor" else "another answer than was stored"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
            failure[0] = str(error).strip().splitlines()[0]

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(seconds)
    if not failure[0]:
        return Finding("torch's store", "ok", f"answers on {host}")
    remedy = f"IPv4 and ::ffff: lines for {host} in /etc/hosts" if many_nodes else "let processes connect on 127.0.0.1"
    return Finding("torch's store", "problem", f"{host}: {failure[0]}", remedy)


def check_ports() -> Finding:
    """`uft train` takes MASTER_PORT, or any free port; launchers by hand take 29500."""
    try:
        port = master_port()
    except UserError as error:
        return Finding("ports", "problem", str(error), "unset MASTER_PORT, or give a free one")
    except OSError as error:
        return Finding("ports", "problem", f"no port is free ({error.strerror})", "see net.ipv4.ip_local_port_range")
    if not _is_free(USUAL_PORT):
        remedy = f"--master-port {port} with torchrun or deepspeed by hand; `uft train` needs nothing"
        return Finding("ports", "note", f"{USUAL_PORT}, the launchers' own, is in use; {port} is free", remedy)
    return Finding("ports", "ok", f"{port} is free" + (" (MASTER_PORT)" if "MASTER_PORT" in os.environ else ""))


def check_shared_memory(has_gpus: bool, folder: Path = Path("/dev/shm"), free: int | None = None) -> Finding:
    """NCCL moves data between GPUs through it, where they cannot reach each other; containers give it 64 MiB."""
    if free is None:
        try:
            stat = os.statvfs(folder)
        except OSError:
            return Finding(
                "shared memory", "problem" if has_gpus else "note", f"no {folder}", f"mount tmpfs on {folder}"
            )
        free = stat.f_bavail * stat.f_frsize
    found = f"{free / _GIB:.2f} GiB free in {folder}"
    if free < _GIB:
        remedy = "docker run --shm-size=8g, or --ipc=host"
        return Finding("shared memory", "problem" if has_gpus else "note", found, remedy)
    return Finding("shared memory", "ok", found)


def check_limits(
    get: Callable[[int], tuple[int, int]] = resource.getrlimit, fast_network: Path = Path("/sys/class/infiniband")
) -> list[Finding]:
    """Open files, and locked memory where there is a network that reads memory itself."""
    files, most = get(resource.RLIMIT_NOFILE)
    findings = [Finding("open files", "ok", f"at most {_said(files)}")]
    if files != resource.RLIM_INFINITY and files < 1024:
        findings = [Finding("open files", "problem", f"at most {files}, expected 1024", f"ulimit -n {_said(most)}")]
    if fast_network.is_dir() and any(fast_network.iterdir()):
        locked, _ = get(resource.RLIMIT_MEMLOCK)
        if locked == resource.RLIM_INFINITY:
            findings.append(Finding("locked memory", "ok", "unlimited"))
        else:
            found = f"{locked / 2**20:.0f} MiB; NCCL over InfiniBand fails with 'ibv_reg_mr' errors"
            remedy = "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK"
            findings.append(Finding("locked memory", "problem", found, remedy))
    return findings


def _chosen(asked: str, names: Sequence[str], *, by_prefix: bool) -> list[str]:
    """NCCL: prefixes, all but some with `^`, exact names with `=`. gloo: exact names."""
    is_excluded = by_prefix and asked.startswith("^")
    asked = asked.removeprefix("^") if by_prefix else asked
    is_exact = not by_prefix or asked.startswith("=")
    wanted = [part.strip() for part in asked.removeprefix("=").split(",")]
    matches = [name for name in names if any(name == one if is_exact else name.startswith(one) for one in wanted)]
    return [name for name in names if name not in matches] if is_excluded else matches


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


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _said(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
