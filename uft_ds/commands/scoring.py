"""`uft score` gives the answers of a data set scores: by code, a judge or a reward model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from uft_ds.commands.judge_options import (
    JUDGE_PANEL,
    Concurrency,
    JudgeBody,
    JudgeKeyEnv,
    Price,
    ReplyCache,
    RequestsPerMinute,
    Timeout,
    Tries,
)
from uft_ds.commands.shared import console, quiet_loading, stopped_in_words
from uft_ds.errors import EXIT_CRASHED, CheckFailed, UserError

_DATA, _OTHER = "Data", "Other scorers"


def score(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder or a hub name, as a source's `path`.")],
    by: Annotated[
        str,
        typer.Option(
            metavar="SCORER", help="code:package.module:function, regex:PATTERN, length, judge or reward:FOLDER."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="The file to write; OUT.jsonl.scoring/ is beside it.")],
    rule: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it
        typer.Option(
            "--map", metavar="RULE", help="From raw values to 0..1: sigmoid, affine:LOW,HIGH, quantile, isotonic:FILE."
        ),
    ] = None,
    max_failures: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of answers that may have no score; above it exit code 1.")
    ] = 0.1,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The first rows only.")] = None,  # noqa: UP045
    pairs: Annotated[
        Literal["keep", "split"], typer.Option(help="Write a pair as a pair, or as two scored rows.")
    ] = "keep",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked and what it may cost; write nothing.")
    ] = False,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Ask again for what failed, of a complete output, too.")
    ] = False,
    format: Annotated[  # noqa: A002 - the recipe's word
        str, typer.Option(help="Of the rows; `uft data formats` lists them.", rich_help_panel=_DATA)
    ] = "jsonl",
    split: Annotated[Optional[str], typer.Option(help="As in a source.", rich_help_panel=_DATA)] = None,  # noqa: UP045
    columns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As in a source: '{prompt: question, response: answer}'.", rich_help_panel=_DATA),
    ] = None,
    score_range: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="As in a source: 1,10, if the rows have scores.", rich_help_panel=_DATA),
    ] = None,
    on_bad_row: Annotated[
        Literal["refuse", "quarantine"],
        typer.Option(help="quarantine: leave bad rows out, and list them.", rich_help_panel=_DATA),
    ] = "refuse",
    max_quarantined: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the rows.", rich_help_panel=_DATA)
    ] = 0.01,
    judge_url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    judge_model: Annotated[Optional[str], typer.Option(help="Its name there.", rich_help_panel=JUDGE_PANEL)] = None,  # noqa: UP045
    judge_key_env: JudgeKeyEnv = None,
    judge_body: JudgeBody = None,
    template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Your own question, with {prompt}, {answer} and {verdict}.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    scale: Annotated[str, typer.Option(help="Worst and best grade.", rich_help_panel=JUDGE_PANEL)] = "1,10",
    pairwise: Annotated[
        bool,
        typer.Option("--pairwise", help="Compare the answers of a row, in both orders.", rich_help_panel=JUDGE_PANEL),
    ] = False,
    concurrency: Concurrency = 8,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    max_tokens_spent: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="For this output, prompts and replies together.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    price: Price = None,
    max_cost: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="For this output, in the price's currency.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    cache: ReplyCache = None,
    time_limit: Annotated[
        float, typer.Option(min=0.01, max=86_400.0, help="code, regex: seconds for one answer.", rich_help_panel=_OTHER)
    ] = 10.0,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="code, regex: processes; one per core.", rich_help_panel=_OTHER),
    ] = None,
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="length: a model's, to count tokens, not characters.", rich_help_panel=_OTHER),
    ] = None,
    dtype: Annotated[
        Optional[Literal["float32", "bfloat16", "float16"]],  # noqa: UP045
        typer.Option(help="reward: the stored one on a GPU, float32 on a CPU.", rich_help_panel=_OTHER),
    ] = None,
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="reward: longest conversation, in tokens.", rich_help_panel=_OTHER),
    ] = None,
) -> None:
    """Give the answers of a data set scores from 0 to 1, ready for a recipe's source of format jsonl.

    Interrupted in any way, the same command goes on where it stopped. Exit codes: 0 done, 1 too many failures, 2 bad
    input, 3 a limit is reached or the judge is down, 130 stopped by a signal.
    """
    from uft_ds.scoring.build import JudgeOptions, Limits, default_rule, scorer_of
    from uft_ds.scoring.judge import JudgeScorer
    from uft_ds.scoring.mapping import bounds_of
    from uft_ds.scoring.rows import Reading, Rows
    from uft_ds.scoring.run import Target, check_pairwise, rehearse, score_data
    from uft_ds.scoring.shown import how_it_ended, in_words, shown_progress, table_of

    reading = Reading(
        data,
        format,
        split,
        _columns(columns),
        None if score_range is None else _range(score_range),
        max_quarantined if on_bad_row == "quarantine" else None,
    )
    judge = JudgeOptions(
        url=judge_url,
        model=judge_model,
        key_env=judge_key_env,
        template=template,
        pairwise=pairwise,
        scale=bounds_of(scale, "--scale"),
        body=judge_body,
        cache=cache,
        limits=Limits(
            requests_per_minute,
            concurrency,
            timeout,
            tries,
            max_tokens_spent,
            max_cost,
            None if price is None else prices(price),
        ),
    )
    target = Target(out, rule or default_rule(by, judge), pairs == "split", limit, max_failures)
    rows = Rows(reading)
    if by.startswith("reward:") or tokenizer is not None:
        quiet_loading()
    scorer = scorer_of(
        by,
        judge=judge,
        seconds=time_limit,
        workers=workers,
        tokenizer=tokenizer,
        dtype=dtype,
        max_length=max_length,
    )
    if pairwise:
        check_pairwise(rows, limit)
    is_judge = isinstance(scorer, JudgeScorer)
    cost = scorer.budget.cost if isinstance(scorer, JudgeScorer) and price is not None else None
    try:
        if dry_run:
            for line in in_words(rehearse(rows, scorer, target), is_judge=is_judge, cost=cost):
                console.print(line)
            return
        with stopped_in_words(f"{out} is not written yet"), shown_progress(console, cost) as on_progress:
            outcome = score_data(
                rows,
                scorer,
                target,
                retry_failures=retry_failures,
                on_begin=scorer.budget.begin if isinstance(scorer, JudgeScorer) else lambda spent, keep: None,
                on_progress=on_progress,
            )
    except CheckFailed as error:
        raise CheckFailed(f"{error}\n{out} is not written; the same command goes on where this one stopped") from None
    finally:
        scorer.close()
    console.print(table_of(outcome.summary, cost))
    console.print(how_it_ended(outcome, target))
    if not outcome.is_written:
        raise typer.Exit(EXIT_CRASHED)


def _columns(text: str | None) -> tuple[tuple[str, str | None], ...]:
    """`{ours: theirs, ours: null}`, the braces may be left out."""
    if text is None:
        return ()
    import yaml

    try:
        value = yaml.safe_load("{" + text.strip().removeprefix("{").removesuffix("}") + "}")
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(
        isinstance(ours, str) and (theirs is None or isinstance(theirs, str)) for ours, theirs in value.items()
    ):
        raise UserError(f"--columns: found {text!r}, expected names such as '{{prompt: question, response: answer}}'")
    return tuple(value.items())


def _two(text: str, option: str) -> tuple[float, float]:
    """Two numbers, separated by a comma; brackets, as in a recipe, may be there."""
    try:
        first, second = map(float, text.strip().removeprefix("[").removesuffix("]").split(","))
    except ValueError:
        first = second = math.nan
    if not (math.isfinite(first) and math.isfinite(second)):
        raise UserError(f"{option}: found {text!r}, expected two numbers such as 1,10")
    return first, second


def _range(text: str) -> tuple[float, float]:
    low, high = _two(text, "--score-range")
    if low >= high:
        raise UserError(f"--score-range: found {text!r}, expected the lowest score first, then the highest")
    return low, high


def prices(text: str) -> tuple[float, float]:
    """What a million tokens of prompts and of replies cost, as `--price` gives it."""
    prompt, completion = _two(text, "--price")
    if min(prompt, completion) < 0:
        raise UserError(f"--price: found {text!r}, expected what a million tokens of prompts and of replies cost")
    return prompt, completion
