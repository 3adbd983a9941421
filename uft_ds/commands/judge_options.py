"""Options of the commands that ask a judge: the same words, limits and defaults wherever one is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

JUDGE_PANEL = "Judge"

JudgeKeyEnv = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Environment variable that holds the key.", rich_help_panel=JUDGE_PANEL),
]
JudgeBody = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="JSON: further fields of each request; null leaves one out.", rich_help_panel=JUDGE_PANEL),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=JUDGE_PANEL)]
RequestsPerMinute = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(min=0.01, help="At most.", rich_help_panel=JUDGE_PANEL),
]
Timeout = Annotated[
    float, typer.Option(min=0.1, max=86_400.0, help="Seconds of one request.", rich_help_panel=JUDGE_PANEL)
]
Tries = Annotated[int, typer.Option(min=1, help="How often a request that fails is sent.", rich_help_panel=JUDGE_PANEL)]
Price = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="PROMPT,COMPLETION: what a million tokens cost.", rich_help_panel=JUDGE_PANEL),
]
ReplyCache = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Where replies are kept; uft_ds/judge in the user's cache.", rich_help_panel=JUDGE_PANEL),
]
