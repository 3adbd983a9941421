"""`vllm serve` as far as jobs need it: the stand-in server by vLLM's flags. It ends at a flag that it does not know."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from stand_in_server import StandIn
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", required=True, choices=["float32", "bfloat16"])
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, default=16, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512])
    parser.add_argument("--max-loras", type=int, required=True)
    parser.add_argument("--max-cpu-loras", type=int, required=True)
    parser.add_argument("--generation-config", required=True, choices=["vllm"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    server = StandIn(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval(),
        host=given.host,
        port=given.port,
        max_length=given.max_model_len,
        max_rank=given.max_lora_rank,
        takes_adapters=given.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True",
    )
    server.start()
    print("serving", server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
