"""What `uft judge` is asked to judge, from its options and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks import alpaca_eval, mt_bench
from uft_ds.evaluation.benchmarks.question import Benchmark
from uft_ds.evaluation.judging import grades, wins
from uft_ds.evaluation.judging.length_controlled import OPTION, length_control
from uft_ds.evaluation.judging.prompts import MAX_TOKENS, Case, own_prompts, read_prompts
from uft_ds.evaluation.judging.run import About, Work
from uft_ds.host.files import read_regular_text, sha256
from uft_ds.scoring.build import JudgeOptions, asked_judge, judge_of
from uft_ds.scoring.item import Judgement, Tokens
from uft_ds.scoring.pacing import Budget

ANSWERS = "ANSWERS"


@dataclass(frozen=True)
class JudgingInputs:
    """Whose answers are judged by what. questions to prompts: MT-Bench's; against, lengths: AlpacaEval's.

    lengths: the folder of files from which alpaca_eval takes the effect of length out.
    """

    benchmark: Benchmark
    answers: Path
    questions: Path | None = None
    references: Path | None = None
    prompts: Path | None = None
    against: Path | None = None
    lengths: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Made:
    """A judgement that is ready to begin. close: ends what it has started."""

    work: Work[Any]
    about: About
    budget: Budget
    close: Callable[[], None]


def work_of(asked: JudgingInputs, options: JudgeOptions) -> Made:
    """Read all files, and build the judge.

    Raises:
        UserError: names the option, or file and line.
    """
    mt_benchs = {"--questions": asked.questions, "--references": asked.references, "--prompts": asked.prompts}
    alpacas = {"--against": asked.against, OPTION: asked.lengths, "--template": options.template}
    others = alpacas if asked.benchmark == "mt_bench" else mt_benchs
    for option, value in others.items():
        if value is not None:
            raise UserError(f"{option}: of no use with --benchmark {asked.benchmark}; leave it out")
    return _grading(asked, options) if asked.benchmark == "mt_bench" else _comparing(asked, options)


def _grading(asked: JudgingInputs, options: JudgeOptions) -> Made:
    if asked.questions is None:
        raise UserError("--benchmark mt_bench: needs --questions FILE, MT-Bench's question.jsonl")
    questions = mt_bench.read_questions(asked.questions)
    answers = mt_bench.read_answers(asked.answers, ANSWERS)
    references = None if asked.references is None else mt_bench.read_answers(asked.references, "--references")
    grades.check_known(questions, answers, asked.questions)
    cases = grades.cases_of(questions[: asked.limit], answers, references, (asked.answers, asked.references))
    prompts = own_prompts() if asked.prompts is None else read_prompts(asked.prompts)
    judge = asked_judge(options, max_tokens=MAX_TOKENS)
    name = next(iter(answers.values())).model
    model = model_of(asked.answers)
    identity = {
        "benchmark": "mt_bench",
        "answers": {"name": name, "sha256": model["answers_sha256"]},
        "url": judge.endpoint.url,
    }
    settings = {
        "questions": {"sha256": sha256(asked.questions), "count": len(cases) // mt_bench.TURNS},
        "references": None if asked.references is None else sha256(asked.references),
        "prompts": prompts.version,
        "judge": {key: value for key, value in judge.endpoint.body.items() if value is not None},
        "generation": _generation(model),
    }

    def results(units: Sequence[Case], judgements: Sequence[Judgement]) -> Any:
        name = str(judge.endpoint.body["model"])
        return grades.result_of(units, judgements, judge=name, version=prompts.version)

    work = Work(
        cases,
        lambda case: {"question_id": case.question.key, "turn": case.turn, "prompt": case.prompt},
        lambda units: judge.ask([prompts.asked(case) for case in units]),
        lambda units: judge.plan([prompts.asked(case) for case in units]),
        results,
        4 * judge.concurrency,
    )
    return Made(work, About(name, model, settings, identity), judge.budget, judge.close)


def _comparing(asked: JudgingInputs, options: JudgeOptions) -> Made:
    if asked.against is None:
        raise UserError("--benchmark alpaca_eval: needs --against FILE, the outputs of a reference model")
    answers = alpaca_eval.read_outputs(asked.answers, ANSWERS)
    reference = alpaca_eval.read_outputs(asked.against, "--against")
    duels = wins.duels_of(answers, reference, (asked.answers, asked.against), asked.limit)
    control = None if asked.lengths is None else length_control(asked.lengths, duels)
    scorer = judge_of(options)
    of_judge = scorer.identity()
    name, model = answers[0].generator, model_of(asked.answers)
    whose = "uft_ds's template" if options.template is None else "a template of one's own"
    version = f"pairwise, {whose}#{of_judge['template_sha256'][:12]}"
    identity = {
        "benchmark": "alpaca_eval",
        "answers": {"name": name, "sha256": model["answers_sha256"]},
        "url": of_judge["url"],
    }
    settings = {
        "against": {"name": reference[0].generator, "sha256": sha256(asked.against), "count": len(duels)},
        "prompts": version,
        "rule": of_judge["rule"],
        "length_control": None if control is None else control.identity(),
        "judge": of_judge["body"],
        "generation": _generation(model),
    }

    def ask(units: Sequence[wins.Duel]) -> list[Judgement]:
        # The two sides of a duel share one row; the first one's judgement is the model's share, with all tokens.
        sides = [side for row, duel in enumerate(units) for side in duel.sides(row)]
        return scorer.score(sides)[::2]

    def plan(units: Sequence[wins.Duel]) -> list[tuple[str, Tokens, bool]]:
        return scorer.plan([side for row, duel in enumerate(units) for side in duel.sides(row)])

    def results(units: Sequence[wins.Duel], judgements: Sequence[Judgement]) -> Any:
        names = name, reference[0].generator
        controlled = {} if control is None else control.metrics(units, judgements, names)
        judge = str(of_judge["body"]["model"])
        return wins.result_of(units, judgements, judge=judge, version=version, further=controlled)

    work = Work(duels, lambda duel: {"item": duel.item, "place": duel.place}, ask, plan, results, scorer.batch_items)
    return Made(work, About(name, model, settings, identity), scorer.budget, scorer.close)


def model_of(answers: Path) -> dict[str, Any]:
    """What is known of the model that answered: from the record of `uft generate`, if the file is still what it wrote.

    Returns:
        the record's settings and lengths; of another file its hash alone.
    """
    digest = sha256(answers)
    try:
        record = json.loads(read_regular_text(answers.with_name(f"{answers.name}.settings.json")))
        if record["done"]["sha256"] == digest:
            return {"answers_sha256": digest, **{key: value for key, value in record.items() if key != "format"}}
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return {"answers_sha256": digest}


def _generation(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the answers were drawn, where `uft generate` has said it: numbers of other temperatures are other numbers."""
    names = ("temperature", "top_p", "max_new_tokens")
    return {name: model[name] for name in names if name in model} or None
