"""Compile the Triton sweeps for GPUs that are not here; print as JSON what each kernel would use there.

A process of its own: where `TRITON_INTERPRET` is set, kernels are not compilable. Arguments: targets, such as 90.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uft_ds.kernels.rows_triton import absorb_kernel, launch_options, residuals_kernel

FLOATS = ("highest_ptr", "others_ptr", "target_ptr", "weighted_ptr", "rescale_ptr", "scales_ptr", "products_ptr")
INTEGERS = ("first_token", "width", "kept_rows", "products_stride", "out_stride")
POINTERS = (*FLOATS, "out_ptr", "bias_ptr", "targets_ptr")
WIDTHS = ("width", "products_stride", "out_stride")
"""The launcher tells the compiler which arguments are divisible by 16: pointers are, and these where the vocabulary is.
Without it loads are scalar."""


@dataclass(frozen=True)
class Variant:
    kernel: str
    weights: str
    bias: bool
    capped: bool
    entropy: bool
    width: int = 151_936


@dataclass(frozen=True)
class Build:
    """Resources of one kernel on one target."""

    target: int
    variant: Variant
    spilled_bytes: int
    registers: int
    shared_bytes: int
    vector_loads: int
    """Of four floats, in loops."""
    scalar_loads: int
    """Of fewer floats, in loops."""
    loops: int
    fenced_loops: int
    """Loops that write, every load of the tile before a barrier and every store after it."""


def variants() -> Iterator[Variant]:
    for weights in ("bf16", "fp16", "fp32"):
        yield Variant("residuals", weights, bias=False, capped=False, entropy=False)
        yield Variant("absorb", weights, bias=False, capped=False, entropy=False)
    for weights in ("bf16", "fp32"):
        yield Variant("residuals", weights, bias=True, capped=True, entropy=False)
        yield Variant("absorb", weights, bias=True, capped=True, entropy=True)
    for width in (50_257, 100):  # GPT-2's, odd; a narrow last tile
        yield Variant("residuals", "bf16", bias=True, capped=False, entropy=False, width=width)
        yield Variant("absorb", "bf16", bias=True, capped=False, entropy=True, width=width)


def build(variant: Variant, target: int) -> Build:
    kernel = absorb_kernel if variant.kernel == "absorb" else residuals_kernel
    options = launch_options(variant.width)
    constants = {"HAS_BIAS": variant.bias, "CAPPED": variant.capped, "BLOCK": options["BLOCK"]}
    if variant.kernel == "absorb":
        constants["WITH_ENTROPY"] = variant.entropy
    types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    types |= {"targets_ptr": "*i64", "out_ptr": f"*{variant.weights}", "bias_ptr": f"*{variant.weights}"}
    names, aligned = kernel.arg_names, POINTERS if variant.width % 16 else POINTERS + WIDTHS
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else types.get(name, "fp32") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names},
        ),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": options["num_warps"]},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = assembled(ptx, target)
    loops = loops_of(ptx)
    return Build(
        target,
        variant,
        spilled,
        registers,
        compiled.metadata.shared,
        sum(len(re.findall(r"ld\.global\.v4\.[bf]32", loop)) for loop in loops),
        sum(len(re.findall(r"ld\.global(?:\.\w+)*\.[bf]32", loop)) for loop in loops)
        - sum(len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.[bf]32", loop)) for loop in loops),
        len(loops),
        sum(is_fenced(loop) for loop in loops),
    )


def loops_of(ptx: str) -> list[str]:
    """The instructions between a label and a later branch back to it, of each loop."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if branch and labels[branch.group(1)] < i:
            loops.append("\n".join(lines[labels[branch.group(1)] : i]))
    return loops


def is_fenced(loop: str) -> bool:
    events = re.findall(r"ld\.global|bar\.sync|barrier\.sync|st\.global", loop)
    letters = "".join({"ld.global": "l", "st.global": "s"}.get(event, "b") for event in events)
    return re.fullmatch("l+b+s+", letters) is not None


def assembled(ptx: str, target: int) -> tuple[int, int]:
    """Registers a thread, and bytes spilled to memory, by the assembler's own report."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if target >= 90 else "ptxas")
    name = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={name.group(1)}", source, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    assert spills, report
    return int(registers.group(1)), sum(map(int, spills))


if __name__ == "__main__":
    print(json.dumps([asdict(build(variant, int(target))) for target in sys.argv[1:] for variant in variants()]))
