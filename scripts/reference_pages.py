"""Pages of the documentation site that nobody writes: recipe keys, commands, exit codes, metrics by use.

They are computed from what the program itself reads: the schema of `uft recipe keys`, the commands of `uft --help`,
`uft_ds/errors.py`, the rules of the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from uft_ds import cli, errors
from uft_ds.recipe.best import BEST
from uft_ds.recipe.described import describe_keys
from uft_ds.record.verdict import RULES

ROOT = Path(__file__).parents[1]


def reference_pages() -> dict[str, str]:
    """Each page: its place in the site, and its Markdown.

    Raises:
        ValueError: docs/running.md does not explain just the exit codes that there are.
    """
    return {
        "recipe_keys.md": keys_page(),
        "commands.md": commands_page(),
        "exit_codes.md": exit_codes_page(),
        "metrics_by_use.md": metrics_page(),
    }


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


def keys_page() -> str:
    """Every key of a recipe, as `uft recipe keys` has them, one section of the page for each section of a recipe."""
    parts, section = ["# Recipe keys\n\n`uft recipe keys SECTION` shows the same in a terminal."], ""
    for row in describe_keys():
        first, inner, _ = row.key.partition(".")
        if section != (section := first if inner else "the recipe itself"):
            parts.append(f"## {section}")
        default = row.default if row.default == "(required)" else f"Default: `{row.default}`."
        allowed = f" Allowed: {', '.join(f'`{word}`' for word in row.allowed)}." if row.allowed else ""
        parts.append(f"### `{row.key}`\n\n{escaped(row.meaning)}\n\n{default}{allowed}")
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


def exit_codes() -> set[int]:
    """Those that `uft_ds/errors.py` defines."""
    return {code for name, code in vars(errors).items() if name.startswith("EXIT_")}


def exit_codes_page() -> str:
    """The codes that the program defines, with what docs/running.md says of each.

    Raises:
        ValueError: a code is not explained there, or one is that does not exist.
    """
    section = (
        (ROOT / "docs" / "running.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n#")[0]
    )
    meanings = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", section, re.MULTILINE)}
    if meanings.keys() != exit_codes():
        raise ValueError(f"docs/running.md explains exit codes {sorted(meanings)}, there are {sorted(exit_codes())}")
    rows = [(str(code), meanings[code]) for code in sorted(exit_codes())]
    return f"# Exit codes\n\n{table(('code', 'meaning'), *rows)}\n\n[More on running](running.md#exit-codes).\n"


def metrics_page() -> str:
    """Which metrics judge a run, and which may choose its best checkpoint; metrics.md defines them all."""
    judged = [(escaped(rule.look_at), escaped(rule.healthy), escaped(rule.if_not)) for rule in RULES]
    best = [(f"`held_out/{name}`", how) for name, how in BEST.items()]
    return (
        "# Metrics by use\n\n[Metrics](metrics.md) defines every one.\n\n"
        f"## They judge a run\n\n{table(('metric', 'healthy', 'if not'), *judged)}\n\n"
        f"## They choose the best checkpoint\n\nBy `train.keep_best`.\n\n{table(('metric', 'best'), *best)}\n"
    )
