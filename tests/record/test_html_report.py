"""A finished run in one file."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from uft_ds.record.curves import write_curves
from uft_ds.record.html_report import write_report
from uft_ds.record.lines_of_steps import write_step
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.samples import Sample, Trained

METRICS: list[dict[str, Any]] = [
    {"step": 1, "loss": 0.25, "grad_norm": 1.5},
    {"step": 3, "loss": 0.125, "grad_norm": None},
    {"step": 3, "held_out/loss": 0.2},
]


SOURCE: dict[str, Any] = {
    "source": "rows.jsonl", "responses": 1234, "tokens": 56789, "responses_per_epoch": 617.0,
    "left_out": {"too long": 3, "empty": 4}, "rows_quarantined": 2,
}  # fmt: skip


def run_with(tmp_path: Path, lines: list[dict[str, Any]], *, recipe: str = "name: toy\n") -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.recipe.write_text(recipe)
    folder.data_report().parent.mkdir()
    folder.data_report().write_text(json.dumps({"train": [SOURCE], "held_out": []}))
    return folder


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": None}]], ids=["none", "null"])
def test_a_run_without_numbers_still_gets_a_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    """Nothing to draw is no error (and no warning): the run itself may be fine."""
    write_report(run_with(tmp_path, lines), "toy", {})
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_report_holds_picture_numbers_and_recipe(tmp_path: Path) -> None:
    """One file: the panels of the picture are inside; the table has each metric's last value; no link leads out."""
    write_report(run_with(tmp_path, METRICS), "toy run", {"base": "some/model", "steps": "3"})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    embedded = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)">', text)
    panels = write_curves(METRICS, tmp_path / "curves.png")
    assert [(title, base64.b64decode(picture)) for title, picture in embedded] == [
        (one.title, one.png) for one in panels
    ]
    assert [panel.title for panel in panels] == ["loss", "gradient norm"]
    assert not (tmp_path / "health.png").exists(), "nothing of the run belongs there"
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert rows["loss"] == "0.125"
    assert rows["held_out/loss"] == "0.2"
    assert rows["step"] == "3"
    source = "".join(f"<td>{cell}</td>" for cell in ("train", "rows.jsonl", "1,234", "56,789", "617", "7", "2"))
    assert f"<tr>{source}</tr>" in text
    assert "<pre>name: toy\n</pre>" in text
    assert "<h1>toy run</h1>" in text
    assert "<tr><th>base</th><td>some/model</td></tr><tr><th>steps</th><td>3</td></tr>" in text
    assert not re.search(r"https?://|<link|<script", text)


def test_pictures_are_named_and_what_is_missing_is_said(tmp_path: Path) -> None:
    """The text beside each picture says which it is; below them stands what one would expect there."""
    lines = [
        {"step": 1, "loss": 0.5, "responses/score": 4.0, "saturated_stuck/score": 0.0},
        {"step": 1, "held_out/loss": 0.5, "held_out/calibration_error/instruction": 0.1},
    ]
    write_report(run_with(tmp_path, lines), "toy", {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    named = ["loss", "held out: calibration", "training: without gradient (mse, l1)"]
    assert re.findall(r'<img alt="([^"]*)"', text) == named
    assert "<p>Trained on, but not held out: responses of kind score.</p>" in text


class Page(HTMLParser):
    """The elements around each table and picture, innermost last, as `name.class`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.around = list[str](), list[tuple[str, list[str]]]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("table", "img", "pre"):
            self.around.append((tag, list(self.open)))
        if tag not in ("img", "meta"):
            self.open.append(f"{tag}.{dict(attrs).get('class') or ''}")

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop().partition(".")[0] != tag:
            pass


def test_a_narrow_screen_shows_it_all(tmp_path: Path) -> None:
    """As wide as the screen, by its own measure; tables scroll in their boxes, pictures take the width that there is,
    and where answers stand below each other each is named."""
    folder = run_with(tmp_path, METRICS)
    for step in (0, 4):
        write_step(
            folder.samples, step, [Sample(step, "rows.jsonl:7", "score", 0.75, "2?", "3", "5", ended=True)], Sample
        )
    write_report(folder, "toy", {"base": "some/model"}, [Trained(3, "p.jsonl:7", "2 + 2?", (("4", 1.0), ("5", 0.0)))])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    around = Page(text).around
    boxes = {"table": "div.scroll", "img": "div.panels"}
    assert all(elements[-1] == boxes[tag] for tag, elements in around if tag in boxes)
    assert {tag for tag, _ in around} == {"table", "img", "pre"}
    (style,) = re.findall("<style>(.*?)</style>", text, flags=re.S)
    assert ".scroll{overflow-x:auto}" in style
    assert re.search(r"pre\{[^}]*overflow-x:auto", style)
    widths = re.findall(r"(?<![-\w])(?:min-)?width:([^;}]*)", style.replace("(max-width:40rem)", ""))
    assert set(widths) == {"100%", "9rem"}, "nothing is wider than a phone"
    heads = re.findall(r'<td data-head="([^"]*)">', text)
    assert heads == [
        *("held-out prompt", "response of the data", "step 0", "step 4"),
        *("prompt", "best answer", "worst answer"),
    ]


def test_the_report_escapes_what_users_write(tmp_path: Path) -> None:
    """A run's name, a recipe, a data report and a metric's name are text, never markup."""
    attack = "</pre></title><script>alert('&')</script>"
    folder = run_with(tmp_path, [{"step": 1, "loss": 0.5, attack: 1.0}], recipe=f"name: {attack}\n")
    folder.data_report().write_text(json.dumps({"train": [SOURCE | {"source": attack}]}))
    write_step(folder.samples, 0, [Sample(0, attack, "score", 0.5, attack, attack, attack, ended=True)], Sample)
    write_report(folder, attack, {"base": attack})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    places = "title, heading, fact, four of the sample, data twice, metric, recipe"
    assert text.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") == 11, places


def test_control_characters_are_shown(tmp_path: Path) -> None:
    """As in a terminal: none is sent, and text of right-to-left marks stands in the order that it has."""
    folder, text = run_with(tmp_path, METRICS), "a\x1b[2J\u202eb\x00\n\tc"
    write_step(folder.samples, 0, [Sample(0, "rows.jsonl:1", "score", 0.5, text, text, text, ended=True)], Sample)
    write_report(folder, "toy", {})
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("a␛[2J\\u202eb␀\n\tc") == 3


def test_the_report_opens_with_the_verdict(tmp_path: Path) -> None:
    """Before all else: how much is healthy, and of what is not the remedy, word for word."""
    lines = [
        {"step": 0, "held_out/loss": 0.25, "held_out/saturated_stuck/score": 0.0},
        {"step": 4, "held_out/loss": 0.2, "held_out/saturated_stuck/score": 0.25},
    ]
    write_report(run_with(tmp_path, lines), "toy", {"base": "some/model"})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h[12]>(.*?)</h[12]>", text) == ["toy", "Verdict: 1 of 2 healthy", "The run", "Data"]
    assert '<td>0.2 (at the start 0.25)</td><td class="yes">healthy</td><td></td>' in text
    assert '<td class="no">not healthy</td><td>beta or lr too large' in text
    assert "<code>bce</code> has" in text


def test_answers_stand_before_and_after(tmp_path: Path) -> None:
    """One row a prompt, with the answers of the first and the last evaluation; the file has those between."""
    folder = run_with(tmp_path, METRICS)
    for step, answer in ((0, "before"), (2, "between"), (4, "after")):
        sample = Sample(step, "rows.jsonl:7", "score", 0.75, "Name a prime.", "7", answer, ended=step > 0)
        write_step(folder.samples, step, [sample], Sample)
    write_report(folder, "toy", {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    order = [text.index(f">{word}<") for word in ("Name a prime.", "7", "before", "after")]
    assert order == sorted(order)
    assert ">between<" not in text
    assert "those of all 3 evaluations" in text
    assert text.count("cut here") == 1


def test_answers_that_were_trained_on_are_shown_with_the_best_first(tmp_path: Path) -> None:
    """As text: what a policy has written is never markup."""
    answers = (("wrong", 0.0), ("<b>right</b>", 1.0), ("half", 0.5))
    write_report(run_with(tmp_path, METRICS), "toy", {}, [Trained(3, "p.jsonl:7", "2 + 2?", answers)])
    page = (tmp_path / "report.html").read_text()
    section = page[page.index("Answers that were trained on") :]
    assert section.index("&lt;b&gt;right&lt;/b&gt;") < section.index("wrong")
    assert "half" not in section.split("</table>")[0]
    assert "step 3, p.jsonl:7" in section
    assert "<b>right" not in page
