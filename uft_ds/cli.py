"""The `uft` command: it parses, calls and prints."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer
from rich.console import Console

from uft_ds import __version__
from uft_ds.errors import EXIT_INTERRUPTED, CheckFailed, UserError

if TYPE_CHECKING:
    from uft_ds.recipe import Recipe
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
        bool, typer.Option("--resume", help="Go on from a checkpoint: not available in this version.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that the output holds.")] = False,
) -> None:
    """Check everything, then train on this machine's GPUs, or on two CPU processes."""
    from uft_ds.recipe_file import load_recipe

    if resume:
        raise UserError("--resume is not available in this version; start anew in another folder by output=PATH")
    run_training(load_recipe(recipe, tuple(overrides or ())), overwrite=overwrite)


def run_training(recipe: Recipe, *, overwrite: bool) -> None:
    """Prepare, launch, and end the process with the run's exit code unless it is done."""
    folder, _ = _launched(recipe, "training", overwrite=overwrite)
    console.print(f"done: {folder}  (metrics.jsonl, curves.png, report.html, checkpoints/)")


def _launched(recipe: Recipe, what: str, *, overwrite: bool, options: tuple[str, ...] = ()) -> tuple[Path, Status]:
    from uft_ds.run import run_recipe

    folder, status = run_recipe(recipe, what, console, overwrite=overwrite, options=options)
    if status.exit_code != 0:
        raise typer.Exit(status.exit_code)
    return folder, status


@app.command()
def sweep(
    what: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's YAML file; with --grid, a recipe.")],
    overrides: Overrides = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option("--grid", help="key=[value, ...]: run the recipe with each value, or combination of values."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is done.")] = False,
) -> None:
    """Run recipes one after the other, and compare them in one table.

    Overrides hold for every run. What is done is not run again: the same command goes on after an interruption.
    Tokenised data and the reference's log-probs are shared through their caches.
    """
    from uft_ds.run import check_recipe_and_data, run_recipe
    from uft_ds.sweep import run_sweep
    from uft_ds.sweep_file import grid_of, load_sweep

    given = tuple(overrides or ())
    planned = grid_of(what, grid, given) if grid else load_sweep(what, given)
    results = run_sweep(
        planned,
        console,
        check=lambda recipe: check_recipe_and_data(recipe, console),
        train=lambda recipe, again: run_recipe(recipe, "training", console, overwrite=again),
        overwrite=overwrite,
    )
    if any(result.status == "interrupted" for result in results):
        raise typer.Exit(EXIT_INTERRUPTED)
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
        _, status = _launched(filling, "computing the reference", overwrite=False, options=("--only-reference",))
    except typer.Exit as end:
        if end.exit_code == EXIT_INTERRUPTED:
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
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with all defaults and overrides filled in."""
    from uft_ds.recipe_file import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, tuple(overrides or ()))), end="")


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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist yet.")],
    to: Annotated[Literal["merged", "adapter"], typer.Option(help="A whole model, or the adapter alone.")] = "merged",
    dtype: Annotated[
        Optional[Literal["float32", "bfloat16"]],  # noqa: UP045 - typer reads it
        typer.Option(help="Type of the merged weights; the recipe's if not given."),
    ] = None,
) -> None:
    """Write a trained run as a Hugging Face model, checked against what was trained."""
    from uft_ds.checkpoint.convert import convert_to_adapter, convert_to_merged

    _quiet_loading()
    if to == "adapter":
        if dtype is not None:
            raise UserError("--dtype: an adapter is copied as it was trained; leave --dtype out, or take --to merged")
        console.print(f"adapter: {convert_to_adapter(run, out)}")
        return
    result = convert_to_merged(run, out, dtype=dtype, report=lambda text: console.print(text))
    console.print(
        f"model: {result.folder}  (of {result.checkpoint.name}; {result.share_kept:.2%} of the adapter's log-ratios "
        f"kept on {result.num_responses} responses, relative error {result.relative_error:.2%})",
        highlight=False,
    )


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
