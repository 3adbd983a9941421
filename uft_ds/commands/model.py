"""`uft convert` writes a trained model or adapter; `uft chat` talks to a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from uft_ds.commands.shared import console, leaving_nothing, quiet_loading
from uft_ds.errors import UserError


@leaving_nothing()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A run, one of its checkpoints, a PEFT adapter, or a folder of DeepSpeed's."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: a new or an empty one.")],
    to: Annotated[
        Literal["merged", "reward-model", "adapter", "universal"],
        typer.Option(
            help="A whole model, a reward model's run as a sequence classifier, the adapter alone, or DeepSpeed's "
            "universal checkpoint of a run's."
        ),
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
    """Write a run's result as a Hugging Face model or adapter; a merged model is compared with the adapter."""
    from uft_ds.export.convert import (
        MAX_SHARD_BYTES,
        StoredAs,
        convert_to_adapter,
        convert_to_merged,
        convert_to_universal,
    )
    from uft_ds.export.reward_model import convert_to_reward_model
    from uft_ds.run.start import preparation
    from uft_ds.streams.weight_files import bytes_of

    quiet_loading()
    is_whole = to in ("merged", "reward-model")
    if not is_whole and dtype is not None:
        raise UserError(f"--dtype: --to {to} keeps the trained types; leave --dtype out, or take --to merged")
    if not is_whole and max_shard_size is not None:
        raise UserError(f"--max-shard-size: of no use with --to {to}; leave it out")
    if to == "universal":
        given = [name for name, value in (("--base", base), ("--adapter-config", adapter_config)) if value is not None]
        if given and not (source / "adapter_config.json").exists():
            raise UserError(
                f"{given[0]}: of no use with --to universal, which converts a run's own checkpoint; leave it out"
            )
        console.print(f"universal checkpoint: {convert_to_universal(source, out, say=console.print).folder}")
        return
    if to == "adapter":
        result = convert_to_adapter(source, out, base=base, adapter_config=adapter_config, say=console.print)
        console.print(f"adapter: {result.folder}  (of {result.source})")
        return
    if to == "reward-model" and adapter_config is not None:
        raise UserError("--adapter-config: of no use with --to reward-model, which converts a run; leave it out")
    stored = StoredAs(dtype, MAX_SHARD_BYTES if max_shard_size is None else bytes_of(max_shard_size))
    with preparation(console) as on_progress:
        write = (
            convert_to_reward_model
            if to == "reward-model"
            else partial(convert_to_merged, adapter_config=adapter_config)
        )
        result = write(
            source,
            out,
            base=base,
            stored=stored,
            verify=verify,
            say=lambda text: console.print(text),
            on_progress=on_progress,
        )
    what = "reward model" if to == "reward-model" else "model"
    console.print(f"{what}: {result.folder}  (of {result.source.name}; {result.checked})")


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

    quiet_loading()
    loaded, tokenizer = load_for_generation(model)
    hold_chat(loaded, tokenizer, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, system=system)
