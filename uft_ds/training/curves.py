"""A finished run as pictures: curves.png, and report.html that holds them with the last numbers."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from uft_ds.data.example import KINDS
from uft_ds.files import write_atomically
from uft_ds.training.metrics import read_metrics
from uft_ds.training.run_folder import RunFolder

_COLORS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))


def write_curves(lines: Seq[dict[str, Any]], path: Path) -> None:
    """Loss, implicit reward by kind, and gradient norm over the steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, reward, norm = figure.subplots(1, 3)
    _draw(loss, lines, "loss", label="training", color="black", alpha=0.35)
    _draw(loss, lines, "held_out/loss", label="held out", color="black", marker="o")
    for kind, color in _COLORS.items():
        _draw(reward, lines, f"implicit_reward/{kind}", label=kind, color=color, alpha=0.5)
        _draw(reward, lines, f"held_out/implicit_reward/{kind}", label=f"{kind}, held out", color=color, marker="o")
    _draw(norm, lines, "grad_norm", label="before clipping", color="tab:purple")
    for axes, title in ((loss, "loss"), (reward, "implicit reward (beta x nats)"), (norm, "gradient norm")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, lines: Seq[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def write_report(folder: RunFolder, name: str) -> None:
    """curves.png and a report.html that needs no other file."""
    lines = read_metrics(folder.metrics)
    picture = folder.path / "curves.png"
    write_curves(lines, picture)
    encoded = base64.b64encode(picture.read_bytes()).decode()
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{'' if value is None else format(value, '.6g')}</td></tr>"
        for key, value in sorted(last.items())
    )
    recipe = html.escape(folder.recipe.read_text(encoding="utf-8"))
    data = html.escape(folder.data_report().read_text(encoding="utf-8"))
    write_atomically(
        folder.path / "report.html",
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%}}td{{padding:.1rem 1rem .1rem 0;font-variant-numeric:tabular-nums}}pre{{background:#f5f5f5;
padding:1rem;overflow-x:auto}}</style></head><body><h1>{html.escape(name)}</h1>
<img alt="loss, implicit reward and gradient norm over the steps" src="data:image/png;base64,{encoded}">
<h2>Last values</h2><table>{rows}</table><h2>Data</h2><pre>{data}</pre><h2>Recipe</h2><pre>{recipe}</pre></body></html>
""",
    )
