"""The program of each rank in the all-reduce proof: `python -m uft_ds.doctor.all_reduce RESULT`, under a launcher."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from uft_ds.host.process import die_with_parent

ELEMENTS = 2**22
"""16 MiB of float32."""
_MINUTES = 2.0


def main(result: Path) -> None:
    """Sum a vector that depends on the rank over all ranks, check every element, and write the duration to `result`.

    Raises:
        RuntimeError: a sum is wrong.
    """
    die_with_parent()
    import torch
    from torch import distributed

    from uft_ds.engine.ranks import current_ranks, init_distributed, local_device

    init_distributed(_MINUTES)
    place, device = current_ranks(), local_device()
    rank, ranks = place.rank, place.world_size
    mine = torch.arange(ELEMENTS, device=device, dtype=torch.float32).remainder(1024) + rank  # exact in float32
    expected = ranks * (mine - rank) + ranks * (ranks - 1) / 2
    distributed.all_reduce(mine.clone())  # the first collective sets up the connections; it is not timed
    distributed.barrier()
    started = time.monotonic()
    total = mine.clone()
    distributed.all_reduce(total)
    is_right = bool(torch.equal(total, expected))  # synchronises with the device, so the time is complete
    seconds = time.monotonic() - started
    if not is_right:
        raise RuntimeError(f"rank {rank}: the sum over {ranks} ranks is wrong")
    if rank == 0:
        found = {"ranks": ranks, "backend": distributed.get_backend(), "seconds": seconds, "bytes": 4 * ELEMENTS}
        result.write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
