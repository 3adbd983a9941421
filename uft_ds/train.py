"""The entry point that launchers start, one process per rank.

    deepspeed --num_gpus 8 --module uft_ds.train RECIPE [key=value ...]
    torchrun --nproc-per-node 8 -m uft_ds.train RECIPE [key=value ...]

`uft train` starts it too, after having checked and prepared everything itself (`--prepared`).
"""

from __future__ import annotations

import gc
import os
import sys

from uft_ds.errors import Stopped
from uft_ds.host.library_warnings import quiet_bitsandbytes
from uft_ds.host.process import die_with_parent
from uft_ds.host.signals import listen
from uft_ds.host.standard_streams import drop_useless_size, prepare_streams


def run() -> int:
    """Run one rank; returns the exit code."""
    die_with_parent()  # before the imports: a rank whose launcher dies meanwhile would wait for it for half an hour
    prepare_streams()
    drop_useless_size()
    request = listen()
    quiet_bitsandbytes()
    # DeepSpeed decorates its Muon optimiser with torch.compile, and every ZeRO optimiser imports it: torch's inductor,
    # one CPU second of imports a rank. Nothing here is compiled. This must be set before torch is imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        # Imported after `listen`: these imports take seconds, in which a signal would silently end the process.
        from uft_ds.run.rank import main

        # What the imports left, 400,000 objects, is never garbage; from here on no collection visits it. DeepSpeed's
        # start alone collects several times.
        gc.freeze()
        return main(request)
    except Stopped as stopped:
        return stopped.exit_code


if __name__ == "__main__":
    exit_code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed. The interpreter's own shutdown may abort (gloo's threads: "terminate called
    # without an active exception"), and a launcher would report that as a failed run.
    os._exit(exit_code)
