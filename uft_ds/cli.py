"""The `uft` command: it parses, calls and prints."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.console import Console

from uft_ds import __version__
from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, CheckFailed, UserError

if TYPE_CHECKING:
    from uft_ds.recipe import Recipe
    from uft_ds.sweep import Result
    from uft_ds.training.run_folder import Status

# Commands import what they need when they run: `uft --help` should not wait for torch.

app = typer.Typer(
    help="One-stage fine-tuning (UFT) of large language models on DeepSpeed ZeRO-3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
data_app = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(help="Look at a run's checkpoints, check and delete them.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
_UNLIMITED = 10_000  # columns: in files and pipes nothing is folded
console = Console(  # no markup: paths may hold brackets and numbers
    markup=False, highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _UNLIMITED
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a YAML file.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.lr=1e-5."),
]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint of the run that the output holds.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that the output holds.")] = False,
) -> None:
    """Check everything, then train on this machine's GPUs, or on two CPU processes."""
    from uft_ds.recipe_file import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite: the one goes on with a run, the other deletes it; give one of them")
    run_training(load_recipe(recipe, tuple(overrides or ())), overwrite=overwrite, resume=resume)


def run_training(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> None:
    """Prepare, launch, and end the process with the run's exit code unless it is done."""
    folder, _ = _launched(recipe, "training", overwrite=overwrite, resume=resume)
    console.print(f"done: {folder}  (metrics.jsonl, curves.png, report.html, checkpoints/)")


def _launched(recipe: Recipe, what: str, **how: Any) -> tuple[Path, Status]:
    from uft_ds.run import run_recipe

    folder, status = run_recipe(recipe, what, console, **how)
    if status.exit_code != 0:
        raise typer.Exit(status.exit_code)
    return folder, status


@app.command()
def status(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """How far a run is, and how it ended; the exit code is the run's, 1 where it goes on or died without a word."""
    from uft_ds.training.progress import progress_of

    found = progress_of(run)
    console.print(found.summary)
    raise typer.Exit(found.exit_code)


@app.command()
def sweep(
    what: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's YAML file; with --grid, a recipe.")],
    overrides: Overrides = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option("--grid", help="key=[value, ...]: run the recipe with each value, or combination of values."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is done.")] = False,
    recipes: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option(help="Run nothing: write each run's recipe below this folder, for jobs of a cluster."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: the table of what is done.")] = False,
) -> None:
    """Run recipes one after the other, and compare them in one table.

    Overrides hold for every run. What is done is not run again, and a run that was stopped goes on: the same command
    goes on after an interruption. Tokenised data and the reference's log-probs are shared through their caches.
    """
    from uft_ds.run import check_recipe_and_data, run_recipe
    from uft_ds.sweep import run_sweep, table_of, write_recipes
    from uft_ds.sweep_file import grid_of, load_sweep

    given = tuple(overrides or ())
    planned = grid_of(what, grid, given) if grid else load_sweep(what, given)
    if (recipes is not None) + table + overwrite > 1:
        raise UserError("--recipes, --table, --overwrite: give one of them")
    if recipes is not None:
        for folder in write_recipes(planned, recipes):
            print(folder)
        return
    if table:
        _fail_unless_all_done(table_of(planned, console))
        return
    results = run_sweep(
        planned,
        console,
        check=lambda recipe: check_recipe_and_data(recipe, console),
        train=lambda recipe, how: run_recipe(recipe, "training", console, overwrite=how.overwrite, resume=how.resume),
        overwrite=overwrite,
    )
    for status, code in (("interrupted", EXIT_INTERRUPTED), ("stopped", EXIT_STOPPED)):
        if any(result.status == status for result in results):
            raise typer.Exit(code)
    _fail_unless_all_done(results)


def _fail_unless_all_done(results: list[Result]) -> None:
    failed = [result.run.name for result in results if result.status != "done"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(results)} runs are not done: {', '.join(failed)}")


@app.command()
def reference(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the reference of a recipe's data ahead, for all runs that share it.

    What is stored already is not computed again; a fill that was stopped goes on where it was. The recipe's output is
    not touched.
    """
    import shutil
    import tempfile

    from uft_ds.recipe_file import load_recipe
    from uft_ds.resolve import caches_reference

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if not caches_reference(loaded):
        why = "objective.loss needs no reference" if loaded.reference.cache else "reference.cache is false"
        raise UserError(f"there is nothing to fill: {why}")
    work = Path(tempfile.mkdtemp(prefix="uft-reference-"))
    filling = loaded.model_copy(update={"output": str(work / "run")})
    try:
        _, status = _launched(filling, "computing the reference", options=("--only-reference",))
    except typer.Exit as end:
        if end.exit_code in (EXIT_INTERRUPTED, EXIT_STOPPED):
            print("what has been stored is kept: the same command goes on from there", file=sys.stderr)
            shutil.rmtree(work)
        else:  # the ranks failed: their logs stay
            shutil.rmtree(work / "run" / "data", ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    console.print(f"done: {status.message}")


@recipe_app.command("show")
def recipe_show(
    recipe: RecipeName,
    overrides: Overrides = None,
    key: Annotated[Optional[str], typer.Option(help="Only this key's value, such as output.")] = None,  # noqa: UP045
) -> None:
    """Print a recipe with all defaults and overrides filled in."""
    from uft_ds.names import unknown_name
    from uft_ds.recipe_file import dump_recipe, leaves_of, load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()))
    if key is None:
        print(dump_recipe(loaded), end="")
        return
    leaves = leaves_of(loaded)
    if key not in leaves:
        raise UserError(f"--key: {unknown_name(key, tuple(leaves))}")
    print(leaves[key])


@recipe_app.command("list")
def recipe_list() -> None:
    """Names of the recipes that come with the package."""
    from uft_ds.recipe_file import shipped_recipes

    print("\n".join(shipped_recipes()))


@recipe_app.command("keys")
def recipe_keys() -> None:
    """Every key of a recipe, its default and its meaning."""
    from uft_ds.recipe import describe_keys

    for key, default, meaning in describe_keys():
        console.print(f"{key} = {default}", style="bold")
        console.print(f"    {meaning}")


@data_app.command("preview")
def data_preview(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Sampled rows of each source.")] = 2,
    source: Annotated[Optional[int], typer.Option(min=0, help="Only this one of data.sources.")] = None,  # noqa: UP045
    held_out: Annotated[bool, typer.Option("--held-out", help="The held-out sources instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Whole rows; long ones are cut otherwise.")] = False,
) -> None:
    """Show what a recipe trains on: sampled rows with their masks and scores, and what is left out and why.

    Nothing is launched and no weights are loaded.
    """
    from uft_ds.data.tokenize import load_tokenizer
    from uft_ds.prepare import prepare_data, steps_of
    from uft_ds.preview import legend, rendered_rows, show_data, steps_line
    from uft_ds.recipe_file import load_recipe
    from uft_ds.run import preparation

    loaded = load_recipe(recipe, tuple(overrides or ()))
    model = loaded.model
    chat = load_tokenizer(model.base, revision=model.revision, chat_template=model.chat_template)
    with preparation(console) as on_progress:
        data = prepare_data(loaded, chat, on_progress)
    sources = data.held_out if held_out else data.train
    if not sources:
        raise UserError("--held-out: the recipe has no data.held_out")
    if source is not None and source >= len(sources):
        raise UserError(f"--source {source}: there are {len(sources)}, numbered from 0")
    console.print(legend())
    for shown in sources if source is None else sources[source : source + 1]:
        for text in rendered_rows(shown, chat, count=rows, seed=seed, full=full):
            console.print(text)
    show_data(loaded, data, console)
    console.print(steps_line(steps_of(loaded, data), loaded.train.examples_per_step))


@data_app.command("formats")
def data_formats() -> None:
    """Names of the source formats, those of installed plug-ins included."""
    from uft_ds.data.formats import described_formats

    for name, description in described_formats().items():
        console.print(name, style="bold")
        console.print(textwrap.indent(description, "    "))


@data_app.command("schema")
def data_schema() -> None:
    """Print the JSON Schema of one row of our own format, jsonl."""
    import json

    from uft_ds.data.formats import jsonl_schema

    print(json.dumps(jsonl_schema(), indent=2))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A run, one of its checkpoints, a PEFT adapter, or a folder of DeepSpeed's."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: a new or an empty one.")],
    to: Annotated[
        Literal["merged", "adapter", "universal"],
        typer.Option(help="A whole model, the adapter alone, or DeepSpeed's universal checkpoint of a run's."),
    ] = "merged",
    base: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it
        typer.Option(help="The base model, a folder or a hub name, where the source does not say it or it has moved."),
    ] = None,
    adapter_config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="adapter_config.json, or its folder, for a folder of DeepSpeed's."),
    ] = None,
    dtype: Annotated[
        Optional[Literal["float32", "bfloat16", "float16"]],  # noqa: UP045
        typer.Option(help="Type of the merged weights; the base's if not given."),
    ] = None,
    max_shard_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Largest file of merged weights, such as 500MB; 5GB if not given."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the merged model's log-ratios with the adapter's.")] = True,
) -> None:
    """Write what was trained as a Hugging Face model or adapter, checked against what was trained."""
    from uft_ds.checkpoint.convert import MAX_SHARD_BYTES, convert_to_adapter, convert_to_merged, convert_to_universal
    from uft_ds.checkpoint.weight_files import bytes_of
    from uft_ds.run import preparation

    _quiet_loading()
    if to != "merged" and dtype is not None:
        raise UserError(f"--dtype: --to {to} keeps what was trained as it is; leave --dtype out, or take --to merged")
    if to != "merged" and max_shard_size is not None:
        raise UserError(f"--max-shard-size: of no use with --to {to}; leave it out")
    if to == "universal":
        given = [name for name, value in (("--base", base), ("--adapter-config", adapter_config)) if value is not None]
        if given and not (source / "adapter_config.json").exists():
            raise UserError(
                f"{given[0]}: of no use with --to universal, which is of a run's own checkpoint; leave it out"
            )
        console.print(f"universal checkpoint: {convert_to_universal(source, out).folder}")
        return
    if to == "adapter":
        result = convert_to_adapter(source, out, base=base, adapter_config=adapter_config)
        console.print(f"adapter: {result.folder}  (of {result.source})")
        return
    with preparation(console) as on_progress:
        result = convert_to_merged(
            source,
            out,
            base=base,
            adapter_config=adapter_config,
            dtype=dtype,
            max_shard_bytes=MAX_SHARD_BYTES if max_shard_size is None else bytes_of(max_shard_size),
            verify=verify,
            report=lambda text: console.print(text),
            on_progress=on_progress,
        )
    found = result.agreement
    checked = "not compared with the adapter" if found is None else found.summary
    console.print(f"model: {result.folder}  (of {result.source.name}; {checked})")


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")]


@checkpoint_app.command("ls")
def checkpoint_ls(run: RunPath) -> None:
    """List the checkpoints, the newest first: step, size, and whether the files are as they were written."""
    from uft_ds.checkpoint.listing import listed

    console.print(listed(run))


@checkpoint_app.command("verify")
def checkpoint_verify(run: RunPath) -> None:
    """Read every file and compare it with the manifest; exit code 3 if one is not as it was written."""
    from uft_ds.checkpoint.listing import problems_of

    problems = problems_of(run)
    if problems:
        raise CheckFailed("\n".join(problems))
    console.print("every file is as it was written")


@checkpoint_app.command("rm")
def checkpoint_rm(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    steps: Annotated[list[int], typer.Argument(metavar="STEP...", help="Steps of the checkpoints to delete.")],
) -> None:
    """Delete checkpoints, and repair the link to the newest one."""
    from uft_ds.checkpoint.listing import delete

    for checkpoint in delete(run, steps):
        console.print(f"deleted: {checkpoint}")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, a100-40, h100, h200 or b200: the data sheet's figures.")] = "h100",
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
        typer.Option(min=1, help="Mean, prompt included; data.max_length if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Plain values, the names ending in their units.")] = False,
) -> None:
    """Say from the model's config alone what a recipe needs on some hardware, and what to change if it does not fit.

    Nothing is allocated, launched or downloaded. Exit code 3 if the recipe as it is does not fit.
    """
    import json

    from uft_ds.planning.hardware import cluster_of
    from uft_ds.planning.plan import make_plan
    from uft_ds.planning.table import as_json as plan_as_json
    from uft_ds.planning.table import rendered
    from uft_ds.recipe_file import load_recipe

    _quiet_loading()
    cluster = cluster_of(
        nodes=nodes,
        gpus=gpus,
        gpu=gpu,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        network_gbits=network_gbits,
        pcie_gbytes=pcie_gbytes,
        tflops=tflops,
        nvlink_gbytes=nvlink_gbytes,
    )
    made = make_plan(load_recipe(recipe, tuple(overrides or ())), cluster, tokens_per_response=tokens_per_response)
    if as_json:
        print(json.dumps(plan_as_json(made), indent=2))
    else:
        console.print(rendered(made))
    if not made.outcome.fits:
        raise typer.Exit(CheckFailed.exit_code)


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `uft convert --to merged` wrote.")],
    prompt: Annotated[Optional[str], typer.Option(help="Answer this one prompt and leave.")] = None,  # noqa: UP045
    system: Annotated[Optional[str], typer.Option(help="A system message.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model."""
    from uft_ds.evaluation.generate import chat as hold_chat
    from uft_ds.evaluation.generate import load_for_generation

    _quiet_loading()
    loaded, tokenizer = load_for_generation(model)
    hold_chat(loaded, tokenizer, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, system=system)


@app.command()
def quickstart(
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs"),
) -> None:
    """Train a small real model from the package index on verifiable tasks; about ten minutes on two cores."""
    from uft_ds.quickstart import run_quickstart

    run_quickstart(folder, tuple(overrides or ()), console=console, train=run_training)


@app.command()
def doctor(
    output: Annotated[Path, typer.Option(help="Where runs will be written; it need not exist.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of findings.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the proofs, which start two ranks each.")] = False,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds for the proofs together.")] = 300.0,
) -> None:
    """Examine the installation and the machine, each finding with its remedy; exit code 3 if there is a problem."""
    from uft_ds.doctor.report import report_on

    report_on(output, console, as_json=as_json, quick=quick, seconds=time_limit)


def _quiet_loading() -> None:
    """transformers' loading bar is for terminals; in a log it is noise."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _version(asked: bool) -> None:
    if asked:
        print(f"uft_ds {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of `uft` itself."""


def main() -> None:
    """Run the command and end the process with its exit code; no traceback for what a user can mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)  # between the libraries below us; nothing a user can mend
    try:
        app()
    except (UserError, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
