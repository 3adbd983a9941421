"""Two end-to-end tests of the installation: two ranks sum a vector, and `uft train` trains a toy model for one step."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from uft_ds.doctor.finding import Finding
from uft_ds.doctor.toy import write_toy
from uft_ds.errors import UserError
from uft_ds.host.process import die_with_parent
from uft_ds.record.metrics_file import read_metrics
from uft_ds.run.launch import master_port, rank_environment

REDUCE = "2-rank all-reduce"
TRAIN = "1-step training"
_SECONDS_TO_STOP = 20  # torchrun passes SIGTERM on and waits for its ranks
_LINES = 12
_INSTRUCTION_LOSS = 0.25  # (sigmoid(0) - 1)^2: before the first update policy and reference are equal


def prove_all_reduce(
    folder: Path, *, seconds: float, program: Sequence[str] = ("-m", "uft_ds.doctor.all_reduce")
) -> Finding:
    """Start two ranks as `uft train` does: with nccl on two or more GPUs, otherwise with gloo.

    Args:
        folder: an empty folder for everything that the ranks write.
        seconds: time limit, after which all ranks are stopped.
        program: the program of each rank; it gets the path of the result as its last argument.
    """
    try:
        port = master_port()
    except UserError as error:
        return Finding(REDUCE, "problem", str(error), "unset MASTER_PORT")
    logs, result = folder / "logs", folder / "all-reduce.json"
    environ = rank_environment(2)
    if torch.cuda.device_count() < 2:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), "--max-restarts", "0"),
        *("--log-dir", str(logs), "--redirects", "3", *program, str(result)),
    ]
    started = time.monotonic()
    code = _run(command, environ, folder / "launcher.log", seconds)
    if code == 0 and result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))
        rate = found["bytes"] / found["seconds"] / 2**20
        took = f"{time.monotonic() - started:.0f} s with the start"
        return Finding(
            REDUCE, "ok", f"right on {found['ranks']} ranks over {found['backend']}, {rate:.0f} MiB/s; {took}"
        )
    said = _end_of([*sorted(logs.glob("**/stderr.log")), folder / "launcher.log"])
    return Finding(
        REDUCE, "problem", f"{_ended(code, seconds)}\n{said}", "see the network's lines above; NCCL_DEBUG=INFO"
    )


def prove_training(folder: Path, *, seconds: float) -> Finding:
    """Train a toy model for one step with `uft train`, and check its files and its loss, which is known exactly.

    Args:
        folder: an empty folder for model, data, caches and run.
        seconds: time limit, after which all processes are stopped.
    """
    recipe = write_toy(folder, has_gpus=torch.cuda.is_available())
    # Hashes, kernels and fonts would go to the user's caches: redirect these, so that this run leaves nothing.
    caches = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    environ = dict(os.environ) | dict.fromkeys(caches, str(folder / "cache")) | {"HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    code = _run([sys.executable, "-m", "uft_ds", "train", str(recipe)], environ, folder / "train.log", seconds)
    run = folder / "run"
    if code != 0 or not (run / "DONE").is_file():
        said = _end_of([*sorted(run.glob("log-rank*.txt")), run / "launcher.log", folder / "train.log"])
        return Finding(TRAIN, "problem", f"{_ended(code, seconds)}\n{said}", "fix what the lines above name")
    (step,) = (line for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line)
    loss, norm = step["loss/instruction"], step["grad_norm"]
    took = f"{time.monotonic() - started:.0f} s with the start"
    if not (math.isclose(loss, _INSTRUCTION_LOSS, abs_tol=1e-3) and math.isfinite(norm) and norm > 0):
        found = f"loss {loss} on instruction data, expected {_INSTRUCTION_LOSS}; gradient norm {norm}"
        return Finding(TRAIN, "problem", found, "wrong numbers: see GPU errors and versions above")
    return Finding(TRAIN, "ok", f"loss {loss:.4f}, gradient norm {norm:.3g}, checkpoint written; {took}")


def _run(command: Sequence[str], environ: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a command and return its exit code, or None after a time-out. No process is left behind in any case."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the launcher, which stops its ranks. These have their own sessions, and die with it if it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            continue


def _ended(code: int | None, seconds: float) -> str:
    return f"not done after {seconds:.0f} s, stopped" if code is None else f"ended with exit code {code}"


def _end_of(logs: Sequence[Path]) -> str:
    """The last lines of each log that is not empty."""
    parts = []
    for log in logs:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        lines = [line for line in lines if line.strip() and "Warning: " not in line]
        if lines:
            name = f"rank {log.parent.name}" if log.name == "stderr.log" else log.name
            parts.append("\n".join([f"--- {name}", *lines[-_LINES:]]))
    return "\n".join(parts)
