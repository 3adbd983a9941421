"""report.html: a finished run in one file, with pictures, last metrics, data report and recipe."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.host.files import write_atomically
from uft_ds.record.curves import write_curves
from uft_ds.record.health_plots import write_health
from uft_ds.record.metrics import read_metrics
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.telemetry import ROW, read_rows


def write_report(folder: RunFolder, name: str) -> None:
    """Write curves.png, health.png, and a report.html that needs no other file.

    Args:
        name: the run's name, used as title.
    """
    lines = read_metrics(folder.metrics)
    write_curves(lines, folder.curves_picture)
    table = read_rows(folder.held_out_rows) if folder.held_out_rows.exists() else np.zeros(0, dtype=ROW)
    write_health(lines, table, folder.health_picture)
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{'' if value is None else format(value, '.6g')}</td></tr>"
        for key, value in sorted(last.items())
    )
    data = json.loads(folder.data_report().read_text(encoding="utf-8"))
    recipe = html.escape(folder.recipe.read_text(encoding="utf-8"))
    write_atomically(
        folder.path / "report.html",
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}th,td{{text-align:left;padding:.1rem 1rem .1rem 0;font-variant-numeric:tabular-nums}}
pre{{background:#f5f5f5;padding:1rem;overflow-x:auto}}</style></head><body><h1>{html.escape(name)}</h1>
<img alt="loss, implicit reward and gradient norm over the steps" src="{_embedded(folder.curves_picture)}">
<img alt="calibration, length bias, pairs, order and saturation" src="{_embedded(folder.health_picture)}">
<h2>Last values</h2><table>{rows}</table><h2>Data</h2>{_data_table(data)}<details><summary>all of it</summary>
<pre>{html.escape(json.dumps(data, indent=2))}</pre></details><h2>Recipe</h2><pre>{recipe}</pre></body></html>
""",
    )


def _data_table(report: dict[str, list[dict[str, Any]]]) -> str:
    head = ("", "source", "responses", "tokens", "per epoch", "left out", "bad rows")
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for part, sources in report.items():
        for source in sources:
            numbers = (
                source["responses"],
                source["tokens"],
                source["responses_per_epoch"],
                sum(source["left_out"].values()),
                source["rows_quarantined"],
            )
            words = (part.replace("_", " "), html.escape(source["source"]), *(f"{number:,.0f}" for number in numbers))
            lines.append("".join(f"<td>{word}</td>" for word in words))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
