"""Pages of the documentation site that nobody writes: recipes, keys, commands, exit codes, metrics by use.

A hook of MkDocs (`mkdocs.yml`); `make docs` runs it. What it writes is computed from what the program itself reads: the
shipped recipes and their plans, the schema of `uft recipe keys`, the commands of `uft --help`, the codes of
`uft_ds/errors.py`, the rules of the verdict. README.md and files beside docs/ that pages link to become pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import typer

from uft_ds import cli, errors
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
from uft_ds.recipe.best import BEST
from uft_ds.recipe.file import described_recipes, shipped_recipes
from uft_ds.recipe.schema import describe_keys
from uft_ds.recipe.settings import Settings, load_settings
from uft_ds.record.verdict import RULES

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "uft_ds" / "recipe" / "shipped"
GPU, GPU_COUNTS = "h100", (1, 2, 4, 8)
NETWORK_GBITS = 400.0
"""As `uft plan` has it; nothing crosses a network here, because one machine is planned."""
ELSEWHERE = {
    "README.md": "index.md",
    "ds_configs/README.md": "deepspeed_files.md",
    "uft_ds/data/formats/jsonl.schema.json": "jsonl.schema.json",
}
"""Files outside docs/ that the site has, and their place in it."""
MEASURED = {
    "quickstart": "It was measured: 8 min 21 s on two ranks, 3.5 GiB each at the peak ([findings](../findings.md#2026-11-23-the-spine))."
}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/. MkDocs calls it once, with the files that it found there."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/, which lead somewhere on GitHub, lead to the same file of the site."""
    is_written = page.file.generated_by is None
    return linked_inside(markdown, "docs") if is_written else markdown


def pages() -> dict[str, str]:
    """Each generated page: its place in the site, and its Markdown.

    Raises:
        UserError: a shipped recipe cannot be planned. ValueError: docs/running.md does not explain just the exit codes.
    """
    copies = {
        place: linked_inside((ROOT / path).read_text(encoding="utf-8"), posixpath.dirname(path))
        for path, place in ELSEWHERE.items()
    }
    recipes = {f"recipes/{name}.md": recipe_page(name) for name in shipped_recipes()}
    return {
        **copies,
        "recipes/index.md": recipes_page(),
        **recipes,
        "recipe_keys.md": keys_page(),
        "commands.md": commands_page(),
        "exit_codes.md": exit_codes_page(),
        "metrics_by_use.md": metrics_page(),
    }


def linked_inside(markdown: str, folder: str) -> str:
    """Relative links of a file of this folder of the repository, as a page at the site's root has them."""

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else link[1])

    return LINK.sub(moved, markdown)


def escaped(text: str) -> str:
    """Plain text as Markdown, also in the cell of a table; what stands between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = (re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;").replace("|", "&#124;") for part in parts[::2])
    code = (part.replace("|", "\\|") for part in [*parts[1::2], ""])
    return "".join(piece for pair in zip(plain, code, strict=True) for piece in pair)


def table(*rows: tuple[str, ...]) -> str:
    """Rows of Markdown as a table; the first one is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((head, "|---" * len(rows[0]) + "|", *body))


def recipes_page() -> str:
    """The shipped recipes, as `uft recipe list` has them."""
    rows = [(f"[{name}]({name}.md)", escaped(text)) for name, text in described_recipes().items()]
    return f"# Shipped recipes\n\n{table(('recipe', 'what it is'), *rows)}\n"


def recipe_page(name: str) -> str:
    """A shipped recipe with its comments, and what it needs.

    Raises:
        UserError: the recipe is for GPUs and cannot be planned.
    """
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    settings = load_settings(name)
    needs = for_cpus(name) if settings.deepspeed.name == FOR_CPU else planned(name, settings)
    return (
        f"# {name}\n\n{escaped(described_recipes()[name])}\n\n    uft train {name}\n\n"
        f"[What each key means](../recipe_keys.md). `uft recipe show {name}` adds all defaults.\n\n"
        f"## The recipe\n\n```yaml\n{text}```\n\n## What it needs\n\n{needs}\n"
    )


def for_cpus(name: str) -> str:
    """What is known of a recipe that needs no GPU."""
    return f"It trains on CPUs (`deepspeed: {FOR_CPU}`), so there is no plan of GPUs for it. {MEASURED.get(name, '')}"


def planned(name: str, settings: Settings) -> str:
    """GPUs, memory and time of a recipe, as `uft plan` computes them for one machine."""
    rows = tuple(plan_rows(settings))
    online = " The time of the answers and their scores, and the generator's memory, are not in them."
    return (
        f"**Planned, not measured**: `uft plan {name} --gpu {GPU} --gpus N` computes these figures, for the recipe as it "
        f"is, with {settings.data.max_length:,} tokens a response, the most there can be. Hours are a forecast at an "
        f"assumed MFU of {ASSUMED_MFU}.{online * settings.is_online} [More of plans](../plan.md).\n\n"
        + table((GPU.upper(), "GB of each", "GB of the host", "hours", "fits"), *rows)
    )


def plan_rows(settings: Settings) -> Iterator[tuple[str, ...]]:
    """For each number of GPUs of a machine: the number, GB of each, GB of the host, hours, whether it fits.

    Raises:
        UserError: the model's config is not available, or the recipe does not fit it.
    """
    planner, amount = planner_of(settings.model.base), amount_of(settings)
    config, _ = model_config(settings.model.base, settings.model.revision)
    workload = workload_of(settings, config, tokens_per_response=None)
    sharding = sharding_of(read_deepspeed_file(settings.deepspeed.name))
    for gpus in GPU_COUNTS:
        cluster = cluster_of(nodes=1, gpus=gpus, gpu=GPU, figures=Figures(network_gbits=NETWORK_GBITS))
        setting = Setting(workload, settings.deepspeed.name, sharding, cluster)
        if settings.model.gradient_checkpointing == "auto":
            setting = fastest_that_fits(planner, setting, fits_gpu)
        outcome = planner.plan(setting)
        duration = duration_of(outcome, planner.structure(workload.lora), amount, mfu_of(settings, ASSUMED_MFU))
        seconds = duration.forecast_seconds
        hours = "unknown" if seconds is None else f"{seconds / 3600:.2g}"
        fits = "yes" if outcome.fits else "no: " + "; ".join((*outcome.problems, *outcome.lacking))
        yield str(gpus), in_gb(outcome.gpu.total_bytes), in_gb(outcome.host.total_bytes), hours, fits


@cache
def planner_of(base: str) -> Planner:
    """One for each model, so that what it measures is measured once."""
    return Planner(model_config(base)[0])


def keys_page() -> str:
    """Every key of a recipe, as `uft recipe keys` has them, one section of the page for each section of a recipe."""
    parts, section = ["# Recipe keys\n\n`uft recipe keys SECTION` shows the same in a terminal."], ""
    for row in describe_keys():
        own = row.key.partition(".")[0] if "." in row.key else "the recipe itself"
        if own != section:
            section = own
            parts.append(f"## {section}")
        allowed = f"\n\nAllowed: {', '.join(f'`{word}`' for word in row.allowed)}" if row.allowed else ""
        default = row.default if row.default == "(required)" else f"default `{row.default}`"
        parts.append(f"### `{row.key}`\n\n{default}{allowed}\n\n{escaped(row.meaning)}")
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Each command by what is typed, `uft` itself first; those of groups after their group."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        inner: Mapping[str, Any] = getattr(command, "commands", {})
        for word, one in inner.items():
            yield from below(f"{name} {word}", one)

    return below("uft", typer.main.get_command(cli.app))


def commands_page() -> str:
    """Usage, help and options of every command, as `--help` has them."""
    parts = ["# Commands\n\nEvery command explains itself: `uft COMMAND --help`."]
    for name, command in commands():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(("    " + name, *command.collect_usage_pieces(context)))
        records = [record for record in (one.get_help_record(context) for one in command.get_params(context)) if record]
        rows = [(escaped(f"`{option}`"), escaped(meaning)) for option, meaning in records]
        parts += [f"## {name}", escaped(command.help or ""), usage, table(("argument or option", "meaning"), *rows)]
    return "\n\n".join(parts) + "\n"


def exit_codes() -> dict[int, str]:
    """Each code of `uft_ds/errors.py` by its number: its name there."""
    return {code: name for name, code in vars(errors).items() if name.startswith("EXIT_")}


def exit_codes_page() -> str:
    """The codes that the program defines, with what docs/running.md says of each.

    Raises:
        ValueError: a code is not explained there, or one is that does not exist.
    """
    section = (
        (ROOT / "docs" / "running.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n#")[0]
    )
    meanings = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", section, re.MULTILINE)}
    if meanings.keys() != exit_codes().keys():
        raise ValueError(f"docs/running.md explains exit codes {sorted(meanings)}, there are {sorted(exit_codes())}")
    rows = [(str(code), f"`{name}`", meanings[code]) for code, name in sorted(exit_codes().items())]
    return f"# Exit codes\n\n{table(('code', 'name', 'meaning'), *rows)}\n\n[More on running](running.md#exit-codes).\n"


def metrics_page() -> str:
    """Which metrics judge a run, and which may choose its best checkpoint; metrics.md defines them all."""
    judged = [(escaped(rule.look_at), escaped(rule.healthy), escaped(rule.if_not)) for rule in RULES]
    best = [(f"`held_out/{name}`", how) for name, how in BEST.items()]
    return (
        "# Metrics by use\n\n[Metrics](metrics.md) defines every one.\n\n"
        f"## They judge a run\n\n{table(('metric', 'healthy', 'if not'), *judged)}\n\n"
        f"## They choose the best checkpoint\n\nBy `train.keep_best`.\n\n{table(('metric', 'best'), *best)}\n"
    )
