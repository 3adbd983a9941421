"""Pages of the documentation site for the shipped recipes: what each is, its YAML, and what `uft plan` says of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path

from reference_pages import escaped, table

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.planning.alternatives import FOR_CPU
from uft_ds.planning.amount import amount_of
from uft_ds.planning.duration import ASSUMED_MFU, duration_of, mfu_of
from uft_ds.planning.hardware import Figures, cluster_of, in_gb
from uft_ds.planning.planner import Planner, Setting
from uft_ds.planning.recompute import fastest_that_fits, fits_gpu
from uft_ds.planning.shapes import model_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.file import described_recipes, shipped_recipes
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings

RECIPES = Path(__file__).parents[1] / "uft_ds" / "recipe" / "shipped"
GPU, GPU_COUNTS = "h100", (1, 2, 4, 8)
NETWORK_GBITS = 400.0
"""As `uft plan` has it; nothing crosses a network here, because one machine is planned."""
MEASURED = {"quickstart": "findings.md#2026-11-23-the-spine"}
"""Recipes whose time and memory have been measured, and where that is written."""


def recipe_pages() -> dict[str, str]:
    """A page for each shipped recipe, and one that lists them: place in the site, and Markdown.

    Raises:
        UserError: a shipped recipe cannot be planned.
    """
    pages = {f"recipes/{name}.md": recipe_page(name) for name in shipped_recipes()}
    return {"recipes/index.md": recipes_page(), **pages}


def recipes_page() -> str:
    """The shipped recipes, as `uft recipe list` has them."""
    rows = [(f"[{name}]({name}.md)", escaped(text)) for name, text in described_recipes().items()]
    return f"# Shipped recipes\n\n{table(('recipe', 'what it is'), *rows)}\n"


def recipe_page(name: str) -> str:
    """A shipped recipe: its comment as text, its YAML, and what it needs.

    Raises:
        UserError: the recipe is for GPUs and cannot be planned.
    """
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = list(takewhile(lambda line: line.startswith("#"), lines))
    about = "\n".join(map(comment_as_text, comment))
    recipe = "\n".join(lines[len(comment) :])
    settings = load_settings(name)
    return (
        f"# {name}\n\n{about}\n\n## The recipe\n\n```yaml\n{recipe}\n```\n\n"
        f"`uft train {name}` trains it, `uft recipe show {name}` adds all defaults. "
        "[What each key means](../recipe_keys.md).\n\n"
        f"## What it needs\n\n{on_cpus(name) if settings.deepspeed.name == FOR_CPU else planned(name, settings)}\n"
    )


def comment_as_text(line: str) -> str:
    """A line of a recipe's comment as Markdown; what is indented there is a command, and starts a block of its own."""
    text = line.removeprefix("#").removeprefix(" ")
    return f"\n{text}" if text.startswith("    ") else escaped(text)


def on_cpus(name: str) -> str:
    """What is known of a recipe that needs no GPU."""
    measured = f" [Its time and memory were measured](../{MEASURED[name]})." if name in MEASURED else ""
    return f"It trains on CPUs (`deepspeed: {FOR_CPU}`), so there is no plan of GPUs for it.{measured}"


def planned(name: str, settings: Settings) -> str:
    """GPUs, memory and time of a recipe, as `uft plan` computes them for one machine."""
    online = " Making and scoring answers is not in them, neither its time nor its memory." * settings.is_online
    rows = table(("GPUs", "fits", "GB of each", "GB of the host", "hours"), *plan_rows(settings))
    return (
        f"**Planned, not measured.** `uft plan {name} --gpu {GPU} --gpus N` computes these figures, and says what to "
        f"change where it does not fit. Responses have {settings.data.max_length:,} tokens, the most there can be; "
        f"hours are a forecast at an assumed MFU of {ASSUMED_MFU}.{online} [More on plans](../plan.md).\n\n{rows}"
    )


def plan_rows(settings: Settings) -> Iterator[tuple[str, ...]]:
    """For each number of GPUs of a machine: the number, whether it fits, GB of each GPU and of the host, hours.

    Raises:
        UserError: the model's config is not available, or the recipe does not fit it.
    """
    planner, amount, file = planner_of(settings.model.base), amount_of(settings), settings.deepspeed.name
    workload = workload_of(settings, model_config(settings.model.base)[0], tokens_per_response=None)
    for gpus in GPU_COUNTS:
        cluster = cluster_of(nodes=1, gpus=gpus, gpu=GPU, figures=Figures(network_gbits=NETWORK_GBITS))
        setting = Setting(workload, file, sharding_of(read_deepspeed_file(file)), cluster)
        if settings.model.gradient_checkpointing == "auto":
            setting = fastest_that_fits(planner, setting, fits_gpu)
        plan = planner.plan(setting)
        duration = duration_of(plan, planner.structure(workload), amount, mfu_of(settings, ASSUMED_MFU))
        hours = "unknown" if duration.forecast_seconds is None else f"{duration.forecast_seconds / 3600:.2g}"
        memory = in_gb(plan.gpu.total_bytes), in_gb(plan.host.total_bytes)
        yield f"{gpus} x {cluster.gpu.name}", "yes" if plan.fits else "no", *memory, hours


@cache
def planner_of(base: str) -> Planner:
    """One for each model, so that what it measures is measured once."""
    return Planner(model_config(base)[0])
