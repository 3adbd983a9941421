"""Log-probs from hidden states, forward and backward: time and memory beside what others do.

    python benchmarks/token_logps.py [--rounds 3] [--quick]
    python benchmarks/token_logps.py --device cuda

The head is frozen. Time is a multiple of one matmul of all N x H x V, measured between the calls in the same process;
the bound is what the matmuls alone would take, 2 for the policy, 3 with a reference, times the share of supervised
rows. Memory is the peak over inputs and the hidden states' gradient, of a call of its own.
On CPU: float32, one thread, CPU seconds (other work on the machine does not count), each method in a process of its
own. On a GPU: bfloat16, events, the allocator's peak; torch and triton are all it needs. What is not installed, or
fails for lack of memory, is left out, and said.

Peers get the supervised rows only, whether or not they could skip the others themselves. On a CPU it takes about 20
minutes and ends with the limits that must hold; exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package is not installed

import torch
from bars import Bar
from process_costs import own_bytes, peak_rss, reset_peak
from torch import Tensor

from uft_ds.kernels.token_logps import IGNORED, token_logps


@dataclass(frozen=True)
class Shape:
    """N tokens, H hidden size, V vocabulary; the share of tokens that is supervised."""

    name: str
    tokens: int
    hidden: int
    vocabulary: int
    supervised: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.hidden * self.vocabulary


SHAPES = {
    "cpu": [
        Shape("Qwen 0.5B's width", 512, 1024, 151_936),
        Shape("Qwen, 40% supervised", 512, 1024, 151_936, 0.4),
        Shape("SmolLM2 135M", 1024, 576, 49_152),
        Shape("Mistral 7B", 256, 4096, 32_768),
    ],
    "cuda": [
        Shape("Qwen 32B", 8192, 5120, 152_064),
        Shape("Qwen 32B, 40% supervised", 8192, 5120, 152_064, 0.4),
        Shape("Llama 3 8B", 8192, 4096, 128_256),
        Shape("Mistral 7B", 8192, 4096, 32_768),
    ],
}


@dataclass(frozen=True)
class Case:
    """Inputs of one shape: logits of a standard deviation of about 3, as a trained model's."""

    hidden_ND: Tensor
    reference_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    """`IGNORED` where not supervised."""
    upstream_N: Tensor


def make_case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    hidden_ND = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    weight_VD = torch.empty(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
    weight_VD.normal_(std=3 / shape.hidden**0.5)
    targets_N = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    ignored_N = torch.arange(shape.tokens, device=device) % 5 >= 5 * shape.supervised
    upstream_N = torch.randn(shape.tokens, device=device)
    return Case(
        hidden_ND.requires_grad_(),
        hidden_ND.detach() + 0.1 * torch.randn_like(hidden_ND),
        weight_VD,
        torch.where(ignored_N, IGNORED, targets_N),
        torch.where(ignored_N, 0.0, upstream_N),
    )


Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden, weight, targets -> log-probs."""


def naive(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = (hidden_ND @ weight_VD.T).float()  # on a GPU rounded to bfloat16 first, as models do
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)


def trl_selective(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden_ND @ weight_VD.T, targets_N)


def trl_chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH
    from trl.trainer.utils import _ChunkedLogProbFunction as Function

    logps_N: Tensor = Function.apply(hidden_ND, weight_VD, None, targets_N, 1.0, WIDTH, None, 1.0, ())[0]
    return logps_N


def torch_linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    # Its automatic chunk can be a few rows, 85 times slower; these are as large as it needs to be near its own best.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024 if hidden_ND.is_cuda else 256)
    return -torch.nn.functional.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none", options=options)


def liger_fused(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Liger

    losses = Liger.apply(hidden_ND, weight_VD, targets_N)
    return -(losses[0] if isinstance(losses, tuple) else losses)


@dataclass(frozen=True)
class Method:
    """A way to get log-probs, and the package that it needs."""

    run: Logps
    package: str | None = None


PEERS = {
    "naive log_softmax": Method(naive),
    "TRL selective_log_softmax": Method(trl_selective, "trl"),
    "TRL chunked_logprob": Method(trl_chunked, "trl"),
    "torch linear_cross_entropy": Method(torch_linear_cross_entropy),
    "Liger fused": Method(liger_fused, "liger_kernel"),
}

OURS: dict[str, dict[str, int | None]] = {
    "uft_ds": {"cpu": None, "cuda": None},
    "uft_ds, small tiles": {"cpu": 2 * 2**20, "cuda": 64 * 2**20},
    "uft_ds, whole rows": {"cpu": 128 * 2**20, "cuda": 2**31},
}
"""`chunk_bytes` by device. By default the vocabulary is cut too: on a CPU above 11k entries, on a GPU above 131k."""


def step(case: Case, name: str, pair: bool) -> Tensor:
    """Forward and backward once; the log-probs of supervised tokens."""
    case.hidden_ND.grad = None
    if name in OURS:
        logps_N, *_ = token_logps(
            case.hidden_ND,
            case.weight_VD,
            case.targets_N,
            others_ND=[case.reference_ND] if pair else [],
            chunk_bytes=OURS[name][case.hidden_ND.device.type],
        )
        logps_N.backward(case.upstream_N)
        return logps_N.detach()[case.targets_N != IGNORED]
    asked_N, run = case.targets_N != IGNORED, PEERS[name].run
    rows = [case.hidden_ND, case.reference_ND, case.targets_N, case.upstream_N]
    if not asked_N.all():
        (rows_M,) = asked_N.nonzero(as_tuple=True)
        rows = [tensor.index_select(0, rows_M) for tensor in rows]
    hidden_MD, reference_MD, targets_M, upstream_M = rows
    if pair:
        with torch.no_grad():
            run(reference_MD, case.weight_VD, targets_M)
    logps_M = run(hidden_MD, case.weight_VD, targets_M)
    logps_M.backward(upstream_M.to(logps_M.dtype))
    return logps_M.detach()


@dataclass(frozen=True)
class Measurement:
    """Of one method at one shape."""

    method: str
    units: float
    """Time, in matmuls of N x H x V."""
    seconds: float
    matmul_seconds: float
    peak_bytes: int
    """Over the inputs and the hidden states' gradient."""
    error: float
    """Of log-probs against float64 on 16 supervised rows, the largest, nats."""


def measure(shape: Shape, name: str, pair: bool, rounds: int, device: str) -> Measurement:
    """In this process; the best of all rounds, because other work only adds. Matmuls and calls alternate."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    small = make_case(Shape("warm-up", 64, shape.hidden, 2048), device, dtype)
    step(small, name, pair)  # imports, compilation, thread pools
    case = make_case(shape, device, dtype)
    products_NV = torch.empty(shape.tokens, shape.vocabulary, device=device, dtype=dtype)

    def matmul() -> None:
        torch.mm(case.hidden_ND.detach(), case.weight_VD.T, out=products_NV)

    matmul()
    case.hidden_ND.grad = torch.zeros_like(case.hidden_ND)  # one of the results: there before as after
    before = bytes_at_rest(device)
    logps_M = step(case, name, pair)
    peak = peak_bytes(device) - before
    exact_M = exact_logps(case)
    error = float((logps_M[: len(exact_M)].double() - exact_M).abs().max())
    times, matmuls = [], [timed(matmul, device)]
    for _ in range(rounds):
        times.append(timed(lambda: step(case, name, pair), device))
        matmuls.append(timed(matmul, device))
    seconds, unit = min(times), min(matmuls)
    return Measurement(name, seconds / unit, seconds, unit, peak, error)


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds, the processor's own on CPU, between events on a GPU."""
    if device != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def bytes_at_rest(device: str) -> int:
    """Memory in use, with everything given back that can be; the peak starts anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # else a call would use for nothing what an earlier one has left
    reset_peak()
    return own_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss()


def exact_logps(case: Case) -> Tensor:
    """In float64, of the first 16 supervised tokens."""
    rows_M = (case.targets_N != IGNORED).nonzero()[:16, 0]
    logits_MV = case.hidden_ND.detach()[rows_M].double() @ case.weight_VD.double().T
    return logits_MV.log_softmax(-1).gather(1, case.targets_N[rows_M, None]).squeeze(1)


def measure_apart(shape: Shape, name: str, pair: bool, rounds: int) -> Measurement:
    """In a process of its own, so that no other method's memory or imports count."""
    request = json.dumps([asdict(shape), name, pair, rounds])
    result = subprocess.run(
        [sys.executable, __file__, "--one", request], capture_output=True, text=True, env=os.environ, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return Measurement(**json.loads(result.stdout.splitlines()[-1]))


def bars(policy: dict[str, list[Measurement]], pair: list[Measurement], qwen: str) -> list[Bar]:
    """What must hold of results by shape; `qwen` is the shape with limits for time and memory."""
    found = []
    main, both = ({m.method: m for m in results} for results in (policy[qwen], pair))
    for name, megabytes in (("uft_ds", 60), ("uft_ds, small tiles", 60), ("uft_ds, whole rows", 160)):
        for what, measured, matmuls in (("policy alone", main[name], 2.4), ("pair", both[name], 3.5)):
            units, peak = measured.units, measured.peak_bytes / 1e6
            found.append(Bar(f"{name}, {what}: at most {matmuls} matmuls", units, units <= matmuls))
            found.append(Bar(f"{name}, {what}: at most {megabytes} MB", peak, peak <= megabytes))
    for shape, results in {**policy, f"{qwen}, pair": pair}.items():
        ours = next(m.units for m in results if m.method == "uft_ds")
        for peer in (m for m in results if m.method in PEERS):
            found.append(Bar(f"{shape}: time of {peer.method}", ours / peer.units, ours <= peer.units))
    return found


def installed() -> list[str]:
    """The methods that can be measured here; the others are said."""
    names = list(OURS)
    for name, method in PEERS.items():
        if method.package is not None and importlib.util.find_spec(method.package) is None:
            print(f"{name}: not measured, {method.package} is not installed")
        elif method.run is torch_linear_cross_entropy and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            print(f"{name}: not measured, torch {torch.__version__} has none in chunks")
        else:
            names.append(name)
    return names


def print_table(shape: Shape, pair: bool, results: list[Measurement]) -> None:
    supervised = f", {shape.supervised:.0%} supervised" if shape.supervised < 1 else ""
    what = "policy and reference" if pair else "policy alone"
    print(f"\n{shape.name}: N={shape.tokens}{supervised}, H={shape.hidden}, V={shape.vocabulary}, {what}")
    print(f"  {'':28}{'matmuls':>9}{'/ bound':>9}{'peak MB':>10}{'error, nats':>13}{'ms':>10}{'TFLOP/s':>9}")
    bound = (3 if pair else 2) * shape.supervised
    for m in results:
        line = f"  {m.method:28}{m.units:9.2f}{m.units / bound:9.2f}{m.peak_bytes / 1e6:10.0f}{m.error:13.1e}"
        print(line + f"{m.seconds * 1e3:10.1f}{bound * shape.flops / m.seconds / 1e12:9.3g}")
    if results:
        unit = min(m.matmul_seconds for m in results)
        print(f"  one matmul: {unit * 1e3:.1f} ms, {shape.flops / unit / 1e12:.3g} TFLOP/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--rounds", type=int, default=3, help="calls of each method, of which the best counts (default: 3)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first shape only, without a reference, no limits checked"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.one:
        fields, name, pair, rounds = json.loads(options.one)
        print(json.dumps(asdict(measure(Shape(**fields), name, pair, rounds, "cpu"))))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU here; --device cpu needs none")
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds}, expected at least 1")
    packages = {name: release(name) for name in ("torch", "triton", "trl", "liger_kernel")}
    print(", ".join(f"{name} {found}" for name, found in packages.items() if found))
    if options.device == "cuda":
        print(torch.cuda.get_device_name())
    names = installed()

    def measured(shape: Shape, pair: bool) -> list[Measurement]:
        results = []
        for name in names:
            try:
                if options.device == "cuda":
                    results.append(measure(shape, name, pair, options.rounds, "cuda"))
                else:
                    results.append(measure_apart(shape, name, pair, options.rounds))
            except RuntimeError as error:  # out of memory, above all: a peer must not end the table
                if name in OURS:
                    raise
                print(f"{name}: not measured at {shape.name}: {str(error).splitlines()[0]}")
        print_table(shape, pair, results)
        return results

    shapes = SHAPES[options.device]
    policy = {shape.name: measured(shape, pair=False) for shape in shapes[: 1 if options.quick else None]}
    if options.quick:
        return 0
    pair = measured(shapes[0], pair=True)
    if options.device == "cuda":
        return 0  # the bars are a CPU's
    print()
    results = bars(policy, pair, shapes[0].name)
    for bar in results:
        print(f"  {'holds ' if bar.holds else 'MISSED'}  {bar.claim}: {bar.value:.3g}")
    return 0 if all(bar.holds for bar in results) else 1


def release(package: str) -> str | None:
    """The installed version; Triton's comes under several distribution names."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    sys.exit(main())
