"""Run a function on several real processes over gloo, with a time-out that kills them by pid."""

import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import forking

from uft_ds.host.ports import free_port


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 300,
    collective_seconds: float = 300,
) -> list[Any]:
    """`[function(*args) on rank 0, on rank 1, ...]`; a failing rank's traceback and log are raised here.

    The process group is up when `function` starts. A hang fails, it does not block.
    """
    port = free_port()
    context = forking()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(
                target=_one_rank, args=(function, rank, world_size, port, folder, collective_seconds, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(process.is_alive() for process in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks still running after {timeout_seconds} s\n{_logs(folder)}")
                if any(process.exitcode not in (None, 0) for process in ranks):
                    time.sleep(1.0)  # let the others write their own traceback
                    break
                time.sleep(0.05)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        if any(process.exitcode != 0 for process in ranks):
            raise AssertionError(f"exit codes {[process.exitcode for process in ranks]}\n{_logs(folder)}")
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _logs(folder: Path) -> str:
    logs = sorted(folder.glob("log*"))
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)


def _one_rank(
    function: Any,
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    collective_seconds: float,
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # a collection would visit, and so copy, all that the server has imported: seconds a rank
    log = (folder / f"log{rank}").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TORCH_EXTENSIONS_DIR=str(folder / f"extensions{rank}"),
    )
    try:
        import torch

        from uft_ds.engine.ranks import init_distributed
        from uft_ds.training.determinism import make_deterministic

        torch.set_num_threads(1)
        make_deterministic()  # as runs do by default
        init_distributed(collective_seconds / 60)
        result = function(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must learn of it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # DeepSpeed's threads need not be waited for
