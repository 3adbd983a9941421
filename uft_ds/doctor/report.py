"""The output of `uft doctor`: progress during the checks, then a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uft_ds.doctor.examination import examine
from uft_ds.doctor.finding import Finding
from uft_ds.errors import CheckFailed
from uft_ds.host.process import ended_as_by_ctrl_c

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def report_on(output: Path, console: Console, *, as_json: bool, quick: bool, seconds: float) -> None:
    """Run the checks and print the findings.

    Raises:
        CheckFailed: there is a problem; names the checks.
    """
    with ended_as_by_ctrl_c():  # so that ranks are ended and temporary files removed
        findings = _examined(output, console, as_json=as_json, quick=quick, seconds=seconds)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        console.print(_table(findings))
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if problems:
        raise CheckFailed(f"{len(problems)} of {len(findings)} checks found a problem: {', '.join(problems)}")
    if not as_json:
        notes = sum(finding.state == "note" for finding in findings)
        console.print(f"no problem in {len(findings)} checks, {notes} notes")


def _examined(output: Path, console: Console, *, as_json: bool, quick: bool, seconds: float) -> list[Finding]:
    is_live = console.is_terminal and not as_json
    with console.status("") if is_live else nullcontext() as status:

        def on_stage(name: str) -> None:
            if status is not None:
                status.update(Text(name))
            elif not as_json:
                console.print(f"checking: {name}")

        return list(examine(output, quick=quick, seconds=seconds, on_stage=on_stage))


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("check", "state", "found", "remedy")
    for finding in findings:
        state = Text(finding.state, style=_COLOURS[finding.state])
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.remedy))
    return table
