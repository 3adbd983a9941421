"""`uft generate` answers the questions of MT-Bench or AlpacaEval; `uft judge` has a judge grade the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

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
from uft_ds.host.terminal import visible

if TYPE_CHECKING:
    from uft_ds.evaluation.benchmarks.lengths import Lengths

_MT_BENCH, _ALPACA_EVAL = "MT-Bench", "AlpacaEval"
Benchmark = Annotated[Literal["mt_bench", "alpaca_eval"], typer.Option(help="Whose questions and layouts they are.")]


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run, one of its checkpoints, an adapter, a model's folder or hub name."
        ),
    ],
    benchmark: Benchmark,
    questions: Annotated[Path, typer.Option(help="MT-Bench: question.jsonl; AlpacaEval: a list of instructions.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="To write; FILE.settings.json is beside it.")],
    name: Annotated[Optional[str], typer.Option(help="Of the model in the file; its folder's.")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The base of a run or adapter, where it has moved."),
    ] = None,
    chat_template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A file in place of the model's own template."),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Of all answers; MT-Bench: by category, AlpacaEval: 0, if it is not given."),
    ] = None,
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest answer, in tokens; MT-Bench: 1024, AlpacaEval: 2048."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The first questions only.")] = None,  # noqa: UP045
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew, whatever is there of other settings.")
    ] = False,
) -> None:
    """Answer the questions of MT-Bench or AlpacaEval, in the layout that their tools and `uft judge` read.

    Interrupted in any way, the same command goes on where it stopped.
    """
    from uft_ds.evaluation.benchmarks.make import GenerationInputs, make_answers

    asked = GenerationInputs(benchmark, questions, temperature, max_new_tokens, seed, batch_size, limit)
    read = asked.read()  # before the model is loaded
    if name is not None:
        _check_name(name)
    quiet_loading()
    from uft_ds.evaluation.models import open_subject
    from uft_ds.run.start import preparation

    subject = open_subject(source, base=base, chat_template=chat_template, say=console.print)
    shown = ", ".join(f"{category} {value:g}" for category, value in asked.temperatures(read).items())
    console.print(
        f"{len(read):,} questions, up to {asked.plan.max_new_tokens:,} tokens an answer; temperature: {visible(shown)}"
    )
    with stopped_in_words(f"{out} is not written yet"), preparation(console) as on_progress:
        made = make_answers(
            asked,
            read,
            subject,
            out,
            name=name or subject.name,
            overwrite=overwrite,
            on_progress=lambda done, total: on_progress("questions answered", done, total),
        )
    _tell_lengths(made.lengths)
    if made.was_complete:
        console.print(f"complete before: {out}; nothing to do")
        return
    before = len(read) - made.new
    console.print(f"done: {out}" + (f"; {before:,} questions had been answered before" if before else ""))


def judge(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="A file that `uft generate` wrote, or FastChat.")],
    benchmark: Benchmark,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="To write: results.json, items/, judgements.jsonl.")],
    judge_url: Annotated[
        str, typer.Option("--judge-url", "--url", help="OpenAI-compatible, such as http://127.0.0.1:8000/v1.")
    ],
    judge_model: Annotated[str, typer.Option("--judge-model", "--judge", help="Its name there.")],
    questions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="question.jsonl.", rich_help_panel=_MT_BENCH),
    ] = None,
    references: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Reference answers for math, reasoning and coding.", rich_help_panel=_MT_BENCH),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="FastChat's judge_prompts.jsonl; our own rubric without it.", rich_help_panel=_MT_BENCH),
    ] = None,
    against: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The reference model's outputs.", rich_help_panel=_ALPACA_EVAL),
    ] = None,
    template: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Your own question, with {prompt}, {answer_a}, {answer_b} and {verdict}.", rich_help_panel=_ALPACA_EVAL
        ),
    ] = None,
    alpaca_eval_files: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FOLDER",
            help="df_gamed.csv and alpaca_eval.json: adds the win rate at equal lengths, by the package alpaca_eval.",
            rich_help_panel=_ALPACA_EVAL,
        ),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The first questions only.")] = None,  # noqa: UP045
    max_failures: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of judgements that may be missing; above it exit code 1.")
    ] = 0.1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked and what it may cost; write nothing.")
    ] = False,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Ask again for what is missing, of a complete folder, too.")
    ] = False,
    judge_key_env: JudgeKeyEnv = None,
    judge_body: JudgeBody = None,
    concurrency: Concurrency = 8,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    max_tokens_spent: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="For this folder, prompts and replies together.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    price: Price = None,
    max_cost: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="For this folder, in the price's currency.", rich_help_panel=JUDGE_PANEL),
    ] = None,
    cache: ReplyCache = None,
) -> None:
    """Have a language model judge answers: MT-Bench's grades, or AlpacaEval's win rate against a reference.

    Interrupted in any way, the same command goes on where it stopped. Exit codes: 0 done, 1 too many failures, 2 bad
    input, 3 a limit is reached or the judge is down, 130 stopped by a signal.
    """
    from uft_ds.commands.scoring import prices
    from uft_ds.evaluation.judging.build import JudgingInputs, work_of
    from uft_ds.evaluation.judging.run import judge_all, rehearse
    from uft_ds.evaluation.judging.shown import how_it_ended, in_words, table_of
    from uft_ds.scoring.build import JudgeOptions, Limits
    from uft_ds.scoring.shown import shown_progress

    money = None if price is None else prices(price)
    options = JudgeOptions(
        url=judge_url,
        model=judge_model,
        key_env=judge_key_env,
        template=template,
        pairwise=benchmark == "alpaca_eval",
        body=judge_body,
        cache=cache,
        limits=Limits(requests_per_minute, concurrency, timeout, tries, max_tokens_spent, max_cost, money),
    )
    asked = JudgingInputs(benchmark, answers, questions, references, prompts, against, alpaca_eval_files, limit)
    made = work_of(asked, options)
    cost = None if price is None else made.budget.cost
    try:
        if dry_run:
            for line in in_words(rehearse(made.work, made.about, out), made.about, cost):
                console.print(line)
            return
        with stopped_in_words(f"{out} is not written yet"), shown_progress(console, cost) as on_progress:
            outcome = judge_all(
                made.work,
                made.about,
                out,
                made.budget,
                max_failures=max_failures,
                retry_failures=retry_failures,
                on_progress=on_progress,
            )
    except CheckFailed as error:
        raise CheckFailed(f"{error}\n{out} is not complete; the same command goes on where this one stopped") from None
    finally:
        made.close()
    if outcome.found is not None:
        console.print(table_of(outcome.found))
    for line in how_it_ended(outcome, out, max_failures, cost):
        console.print(line)
    if outcome.found is None:
        raise typer.Exit(EXIT_CRASHED)


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"--name: found {name!a}, expected a name in UTF-8") from None
    if not name.strip():
        raise UserError("--name: is empty; expected a name for the model")


def _tell_lengths(lengths: Lengths) -> None:
    from uft_ds.evaluation.benchmarks.lengths import QUANTILES

    names = "  ".join(f"{quantile:.0%}" for quantile in QUANTILES)
    console.print(f"answers     {lengths.answers:,}")
    for what, mean, values in (
        ("characters", lengths.mean_characters, lengths.characters),
        ("tokens", lengths.mean_tokens, lengths.tokens),
    ):
        shown = "  ".join(f"{value:,.0f}" for value in values)
        console.print(f"{what:<11} mean {mean:,.1f}; at {names}: {shown}")
    console.print(f"unfinished  {lengths.unfinished:.1%} met the limit of tokens")
    console.print(f"empty       {lengths.empty:.1%}")
