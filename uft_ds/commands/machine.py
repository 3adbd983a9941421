"""`uft plan` computes what a recipe needs; `uft doctor` examines this machine and its installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from uft_ds.commands.shared import Overrides, RecipeName, console, quiet_loading, settings_given
from uft_ds.errors import CheckFailed


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="GPUs of a machine; this one's if not given, or 8."),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Its name, such as h100, a100-40, l40s or rtx4090; this machine's if not given, or h100."),
    ] = None,
    gpu_memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="GB of a GPU; the known one's if not given."),
    ] = None,
    host_memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="GB of a machine; not limited if not given."),
    ] = None,
    network_gbits: Annotated[
        float, typer.Option(min=0.001, help="Gbit/s into a machine, all adapters together.")
    ] = 400,
    pcie_gbytes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.001, help="GB/s between a GPU and host memory; the known GPU's if not given."),
    ] = None,
    nvlink_gbytes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="GB/s into a GPU from those of its machine; 0: they are on PCIe."),
    ] = None,
    tflops: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.001, help="Of a GPU, dense, of the model's type; the known one's if not given."),
    ] = None,
    tokens_per_response: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Mean, prompt included; if not given the tokenised data's, or data.max_length."),
    ] = None,
    mfu: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Share of the peak FLOP/s to forecast with, as the metric mfu; measured or 0.3 if not given."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Plain values, the names ending in their units.")] = False,
) -> None:
    """Compute from the model's config what a recipe needs on given hardware, how long it takes, and what to change.

    Nothing is allocated, launched or downloaded. Exit code 3 if the recipe does not fit unchanged.
    """
    import json

    settings = settings_given(recipe, overrides)
    from uft_ds.planning.hardware import Figures, cluster_of, found_here
    from uft_ds.planning.plan import make_plan
    from uft_ds.planning.table import rendered
    from uft_ds.planning.values import as_json as plan_as_json

    quiet_loading()
    figures = Figures(
        network_gbits=network_gbits,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        pcie_gbytes=pcie_gbytes,
        tflops=tflops,
        nvlink_gbytes=nvlink_gbytes,
    )
    cluster = cluster_of(nodes=nodes, gpus=gpus, gpu=gpu, figures=figures, here=() if gpu else found_here())
    made = make_plan(
        settings,
        cluster,
        tokens_per_response=tokens_per_response,
        mfu=mfu,
    )
    if as_json:
        print(json.dumps(plan_as_json(made), indent=2))
    else:
        console.print(rendered(made))
    if not made.outcome.fits:
        raise typer.Exit(CheckFailed.exit_code)


def doctor(
    output: Annotated[Path, typer.Option(help="Where runs will be written; it need not exist.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of findings.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the proofs, which start two ranks each.")] = False,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds for the proofs together.")] = 300.0,
) -> None:
    """Examine the installation and the machine, each finding with its remedy; exit code 3 if there is a problem."""
    from uft_ds.doctor.report import report_on

    report_on(output, console, as_json=as_json, quick=quick, seconds=time_limit)
