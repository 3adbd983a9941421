"""One stage, in a process of its own: `python -m gpu_check.stage NAME --out FILE --seconds S --work FOLDER [--cpu]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
import warnings
from pathlib import Path


def main() -> int:
    """0: all checks hold; 1: not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The one rank reaches itself without a network, and without a host name that can be resolved.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, for deterministic products
    warnings.filterwarnings("ignore")

    import torch

    from gpu_check.report import Place, Report

    report = Report(options.out)
    try:
        on_gpu = not options.cpu and torch.cuda.is_available()
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        place = Place(device, options.cpu, deadline, options.work)
        module, _, what = options.name.partition(":")
        run = importlib.import_module(f"gpu_check.{module}").run
        _ = run(report, place, what) if what else run(report, place)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the stage's result
        traceback.print_exc()
        report.demand(False, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    report.finish()
    return 1 if report.problems else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed's threads need not be waited for
