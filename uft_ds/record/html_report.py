"""report.html: a finished run in one file, which opens with a verdict and needs no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import groupby, repeat
from typing import Any

from uft_ds.host.files import write_atomically
from uft_ds.host.terminal import as_typed, visible
from uft_ds.record.curves import write_curves
from uft_ds.record.health_plots import Health, write_health
from uft_ds.record.lines_of_steps import read_lines
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.panels import Panel
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.samples import Sample, Trained
from uft_ds.record.task_answers import TaskAnswer
from uft_ds.record.telemetry import read_rows
from uft_ds.record.verdict import Verdict, has_held_out, headline, verdicts

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;
overflow-wrap:break-word}
.panels{margin:1rem 0;display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem;align-items:start}
img{width:100%}.scroll{overflow-x:auto}table{border-collapse:collapse}
th,td{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0;font-variant-numeric:tabular-nums}
pre{background:#f5f5f5;padding:1rem;overflow-x:auto}.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:9rem}
.samples td{border-top:1px solid #ddd}.facts td{overflow-wrap:anywhere}
.yes{color:#177245}.no{color:#b3261e;font-weight:bold}.unclear{color:#8a6100}
small{color:#666;overflow-wrap:anywhere}
@media (max-width:40rem){body{margin:1rem auto}
.prose,.prose tbody,.prose tr,.prose td{display:block}.prose tr{border-top:1px solid #ddd;padding:.5rem 0}
.prose tr.heads{display:none}.prose td{padding:0;border:0;overflow-wrap:anywhere}
.prose td:empty{display:none}.prose td[data-head]::before{content:attr(data-head);color:#666;font-size:smaller}}"""
"""On a narrow screen the cells of a row of prose stand below each other, each under its head; tables of numbers scroll
inside their box."""

_NAMES = {"yes": "healthy", "no": "not healthy", "unclear": "unclear"}


def write_report(folder: RunFolder, name: str, facts: Mapping[str, str], trained: Seq[Trained] = ()) -> None:
    """Write curves.png, health.png, and a report.html that contains them.

    Args:
        name: the run's name, used as title.
        facts: what the run was, by name, such as its base; shown in this order.
        trained: prompts with the policy's own answers, of some steps of an online run.
    """
    lines = read_metrics(folder.metrics)
    curves = write_curves(lines, folder.curves_picture)
    table = read_rows(folder.held_out_rows)
    health = write_health(lines, table, folder.health_picture)
    data = json.loads(folder.data_report().read_text(encoding="utf-8"))
    parts = [
        _verdict(verdicts(lines, table), on_held_out=has_held_out(lines)),
        _facts(facts),
        _samples(read_lines(folder.samples, Sample)),
        _tasks(read_lines(folder.task_answers, TaskAnswer)),
        _trained(trained),
        _pictures(curves),
        _health(health),
        f"<h2>Data</h2>{_data_table(data)}",
        _folded("all counts of the data", _pre(json.dumps(data, indent=2))),
        _folded("last values of all metrics", _last_values(lines)),
        _folded("recipe", _pre(folder.recipe.read_text(encoding="utf-8"))),
    ]
    title, body = html.escape(name), "\n".join(part for part in parts if part)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<head><meta charset="utf-8">{viewport}<title>{title}</title><style>{_STYLE}</style></head>'
    page = f'<!doctype html><html lang="en">{head}<body><h1>{title}</h1>\n{body}\n</body></html>\n'
    write_atomically(folder.path / "report.html", visible(page))


def _verdict(found: Seq[Verdict], *, on_held_out: bool) -> str:
    if not found:
        return ""
    rows = [
        f'<tr><td>{html.escape(of.metric)}</td><td>{html.escape(of.measured)}</td><td class="{of.healthy}">'
        f"{_NAMES[of.healthy]}</td><td>{_prose(of.remedy)}</td></tr>"
        for of in found
    ]
    note = "" if on_held_out else "<p>No data was held out, so these are the responses that the run trained on.</p>"
    table = _table(("metric", "at the end", "", "what to do"), rows, of="prose")
    return f"<h2>Verdict: {headline(found)}</h2>{note}{table}"


def _facts(facts: Mapping[str, str]) -> str:
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f"<h2>The run</h2>{_table((), rows, of='facts')}" if rows else ""


def _samples(samples: Seq[Sample]) -> str:
    """Each prompt with the answers at the first and at the last step that has some."""
    if not samples:
        return ""
    first, last = samples[0].step, samples[-1].step
    answers = {(sample.step, sample.origin, sample.prompt): sample for sample in samples}
    heads = ("held-out prompt", "response of the data", f"step {first}", *([f"step {last}"] if last != first else []))
    rows = []
    for sample in (sample for sample in samples if sample.step == last):
        before = answers.get((first, sample.origin, sample.prompt))
        shown = [before, sample] if last != first else [sample]
        cells = [
            f"{_text(sample.prompt)}<small>{html.escape(as_typed(sample.origin))}</small>",
            f"{_text(sample.response)}<small>score {sample.score:.3g}</small>",
            *("" if one is None else _answer(one) for one in shown),
        ]
        rows.append(_row(cells, heads))
    steps = [step for step, _ in groupby(sample.step for sample in samples)]
    note = f"<p>Greedy answers; samples.jsonl has those of all {len(steps)} evaluations.</p>" if len(steps) > 2 else ""
    return f"<h2>Answers</h2>{note}{_table(heads, rows, of='samples prose')}"


def _answer(sample: Sample) -> str:
    return _text(sample.answer) + ("" if sample.ended else "<small>cut here</small>")


_SHOWN_OF_A_TASK = 3
"""Answers of a task with the lowest scores, and with the highest, in the report."""


def _tasks(answers: Seq[TaskAnswer]) -> str:
    """Of each task the answers with the lowest and the highest scores after the last step, beside the first ones."""
    if not answers:
        return ""
    first, last = answers[0].step, answers[-1].step
    before = {(answer.task, answer.origin): answer for answer in answers if answer.step == first}
    heads = ("task", "prompt", f"step {first}", *([f"step {last}"] if last != first else []))
    rows = []
    for _, of_task in groupby((answer for answer in answers if answer.step == last), key=lambda answer: answer.task):
        graded = sorted(
            (answer for answer in of_task if answer.score is not None), key=lambda answer: answer.score or 0.0
        )
        few = (
            graded if len(graded) <= 2 * _SHOWN_OF_A_TASK else [*graded[:_SHOWN_OF_A_TASK], *graded[-_SHOWN_OF_A_TASK:]]
        )
        for answer in few:
            shown = [before.get((answer.task, answer.origin)), answer] if last != first else [answer]
            cells = [
                html.escape(answer.task),
                f"{_text(answer.prompt)}<small>{html.escape(as_typed(answer.origin))}</small>",
                *("" if one is None else _graded(one) for one in shown),
            ]
            rows.append(_row(cells, heads))
    note = "<p>Greedy answers, those with the lowest and the highest scores; tasks.jsonl has all.</p>"
    return f"<h2>Answers to tasks</h2>{note}{_table(heads, rows, of='samples prose')}"


def _graded(answer: TaskAnswer) -> str:
    grade = "no score" if answer.score is None else f"score {answer.score:.3g}"
    return f"{_text(answer.answer)}<small>{grade}{'' if answer.ended else ', cut here'}</small>"


def _trained(prompts: Seq[Trained]) -> str:
    """Each prompt with its best and its worst answer."""
    if not prompts:
        return ""
    rows, heads = [], ("prompt", "best answer", "worst answer")
    for prompt in prompts:
        ranked = sorted(prompt.answers, key=lambda answer: -answer[1])
        cells = [
            f"{_text(prompt.prompt)}<small>step {prompt.step}, {html.escape(as_typed(prompt.origin))}</small>",
            *(f"{_text(text)}<small>score {score:.3g}</small>" for text, score in (ranked[0], ranked[-1])),
        ]
        rows.append(_row(cells, heads))
    note = "<p>Sampled answers of some steps; rollouts/answers has those of all.</p>"
    return f"<h2>Answers that were trained on</h2>{note}{_table(heads, rows, of='samples prose')}"


def _last_values(lines: Seq[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    values = {key: "" if value is None else format(value, ".6g") for key, value in sorted(last.items())}
    return _table((), [_row((html.escape(key), value)) for key, value in values.items()])


def _data_table(report: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for part, sources in report.items():
        for source in sources:
            numbers = (
                source["responses"],
                source["tokens"],
                source["responses_per_epoch"],
                sum(source["left_out"].values()),
                source["rows_quarantined"],
            )
            words = (
                part.replace("_", " "),
                html.escape(as_typed(source["source"])),
                *(f"{number:,.0f}" for number in numbers),
            )
            rows.append(_row(words))
    return _table(("", "source", "responses", "tokens", "per epoch", "left out", "bad rows"), rows)


def _table(heads: Iterable[str], rows: Iterable[str], *, of: str = "") -> str:
    """Rows of HTML under escaped heads, in a box that scrolls sideways where they are too wide. of: classes."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    start = f'<table class="{of}">' if of else "<table>"
    return "".join(
        ('<div class="scroll">', start, f'<tr class="heads">{head}</tr>' if head else "", *rows, "</table></div>")
    )


def _row(cells: Iterable[str], heads: Seq[str] = ()) -> str:
    """heads: of the cells, for a screen on which they stand below each other."""
    starts = [f'<td data-head="{html.escape(head)}">' for head in heads] or repeat("<td>")
    return "".join(("<tr>", *(f"{start}{cell}</td>" for start, cell in zip(starts, cells, strict=False)), "</tr>"))


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _text(text: str) -> str:
    return f'<div class="text">{html.escape(text)}</div>'


def _prose(markdown: str) -> str:
    """A sentence of the table: its code spans become <code>."""
    parts = html.escape(markdown).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _health(health: Health) -> str:
    note = f"<p>{html.escape(health.missing)}</p>" if health.missing else ""
    return _pictures(health.panels) + note


def _pictures(panels: Seq[Panel]) -> str:
    """Each panel by itself, so that as many stand side by side as can be read."""
    images = (
        f'<img alt="{html.escape(panel.title)}" src="data:image/png;base64,{base64.b64encode(panel.png).decode()}">'
        for panel in panels
    )
    return f'<div class="panels">{"".join(images)}</div>' if panels else ""
