"""Memory that each rank needs to load a model under ZeRO-3, against the model's size.

    python benchmarks/loading_memory.py [--ranks 2] [--layers 24] [--hidden 1024]

Writes a random Qwen2-shaped float32 checkpoint in several shards, loads it by the code that training uses, and
samples each rank's private memory (RssAnon: pages of mapped files, which the kernel may drop, do not count). The
second row loads without partitioning, which is what it costs where each rank holds the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from process_costs import own_bytes


def write_model(folder: Path, hidden: int, layers: int) -> int:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=4096, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.float32)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def load_on_this_rank(folder: str, result: str, partitioned: bool) -> None:
    """One rank: bytes of private memory at the peak of loading and after, over those before."""
    import torch

    from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
    from uft_ds.engine.engine import partitioned_loading
    from uft_ds.engine.ranks import init_distributed
    from uft_ds.streams.load import load_base
    from uft_ds.training.determinism import make_deterministic

    make_deterministic()
    init_distributed(10.0)
    config = deepspeed_config(read_deepspeed_file("zero3_cpu"), dtype=torch.float32, max_grad_norm=1.0)
    before = peak = own_bytes("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_bytes("RssAnon"))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    options: dict[str, Any] = {
        "revision": None,
        "dtype": torch.float32,
        "attention": "sdpa",
        "gradient_checkpointing": False,
    }
    if partitioned:
        with partitioned_loading(config):
            model = load_base(folder, **options)
        # Every weight in the shards is the file's: a loader that skipped some would look cheap.
        assert all(parameter.ds_tensor.numel() > 0 for parameter in model.parameters())
    else:
        model = load_base(folder, **options)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the mapped file, as training would hold it
    done.set()
    watcher.join()
    rank = int(os.environ["RANK"])
    values = {"peak": peak - before, "after": own_bytes("RssAnon") - before}
    Path(f"{result}{rank}.json").write_text(json.dumps(values))


def measure(folder: Path, ranks: int, partitioned: bool) -> list[dict[str, int]]:
    result = folder / f"result-{partitioned}-"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [__file__, "--rank-of", str(folder), "--result", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, *arguments, *(["--partitioned"] if partitioned else [])]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(Path(f"{result}{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--partitioned", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        load_on_this_rank(options.rank_of, options.result, options.partitioned)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder, options.hidden, options.layers)
        print(
            f"model of {size / 2**20:.0f} MiB in float32, {options.ranks} ranks; private MiB a rank, share of the model"
        )
        for label, partitioned in (("ZeRO-3", True), ("whole on each rank", False)):
            for rank, row in enumerate(measure(folder, options.ranks, partitioned)):
                shown = "  ".join(f"{k} {v / 2**20:6.0f} ({v / size:.2f}x)" for k, v in row.items())
                print(f"{label:20} rank {rank}:  {shown}")


if __name__ == "__main__":
    main()
