"""AlpacaEval 2's win rate at equal lengths, by alpaca_eval's own regression."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.benchmarks import alpaca_eval
from uft_ds.evaluation.judging.wins import Duel
from uft_ds.host.files import sha256
from uft_ds.host.terminal import in_one_line
from uft_ds.scoring.item import Judgement

OPTION = "--alpaca-eval-files"
GAMED, QUESTIONS = "df_gamed.csv", "alpaca_eval.json"
RATE = "length_controlled_win_rate"
_SECONDS = 900


@dataclass(frozen=True)
class LengthControl:
    """The files that the regression needs, and the place of each duel in AlpacaEval's list of instructions."""

    gamed: Path
    places: Sequence[int]

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on besides the judgements."""
        return {"alpaca_eval": version("alpaca_eval"), "df_gamed_sha256": sha256(self.gamed)}

    def metrics(
        self, duels: Sequence[Duel], judgements: Sequence[Judgement], names: tuple[str, str]
    ) -> dict[str, float]:
        """The win rate at equal lengths, a share.

        alpaca_eval's `lc_standard_error` is that of the regression's own predictions, which are much alike: it says
        nothing of how sure the rate is, and is left out.

        Args:
            judgements: of each duel, with the model's share. names: of the model and of the reference.
        Raises:
            CheckFailed: a judgement is missing, or alpaca_eval has failed.
        """
        missing = sum(judgement.value is None for judgement in judgements)
        if missing:
            raise CheckFailed(
                f"{OPTION}: the regression needs a judgement of every instruction, and {missing:,} are missing; the "
                f"same command asks again for them, or leave {OPTION} out"
            )
        # The regression takes a row's number for its instruction's place in the list.
        in_order = sorted(zip(self.places, duels, judgements, strict=True), key=lambda of_one: of_one[0])
        rows = [
            {
                "preference": 1.0 + (judgement.value or 0.0),  # alpaca_eval's: 1 for the reference, 2 for the model
                "output_1": duel.reference,
                "output_2": duel.answer,
                "generator_1": names[1],
                "generator_2": names[0],
                "annotator": "uft_ds",
            }
            for _, duel, judgement in in_order
        ]
        found = _asked_of_alpaca_eval(rows, self.gamed)
        return {RATE: found["length_controlled_winrate"] / 100}


def length_control(folder: Path, duels: Sequence[Duel]) -> LengthControl:
    """The regression of these duels.

    Raises:
        UserError: alpaca_eval is not installed, a file is missing, or the duels are not those of all instructions of
            AlpacaEval, each once.
    """
    try:
        version("alpaca_eval")
    except PackageNotFoundError:
        raise UserError(
            f"{OPTION}: needs the package alpaca_eval, whose regression it is: pip install alpaca_eval==0.6.6"
        ) from None
    for name in (GAMED, QUESTIONS):
        if not (folder / name).is_file():
            raise UserError(
                f"{OPTION} {folder}: no {name} in it; expected {GAMED} and {QUESTIONS} of the hub's data set "
                "tatsu-lab/alpaca_eval"
            )
    places: dict[tuple[str, int], int] = {}
    seen: Counter[str] = Counter()
    for question in alpaca_eval.read_questions(folder / QUESTIONS):
        instruction = question.turns[0]
        places[instruction, seen[instruction]] = question.key
        seen[instruction] += 1
    asked = {(duel.instruction, duel.occurrence) for duel in duels}
    if asked != set(places):
        raise UserError(
            f"{OPTION}: the regression is of all {len(places):,} instructions of {folder / QUESTIONS}; here are "
            f"{len(asked):,}, {len(asked & set(places)):,} of them from there; leave {OPTION} out"
        )
    return LengthControl(folder / GAMED, [places[duel.instruction, duel.occurrence] for duel in duels])


def _asked_of_alpaca_eval(rows: Sequence[Mapping[str, Any]], gamed: Path) -> dict[str, float]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("regression.py")), str(gamed.resolve())]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(rows),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{OPTION}: alpaca_eval's regression takes more than {_SECONDS} s") from None
    try:
        found = json.loads(ended.stdout)
        if ended.returncode == 0 and all(math.isfinite(value) for value in found.values()):
            return dict(found)
    except (ValueError, TypeError, AttributeError):
        pass
    said = in_one_line((ended.stderr.strip().splitlines()[-1:] or [ended.stdout])[0], 300)
    raise CheckFailed(f"{OPTION}: alpaca_eval's regression has failed (exit code {ended.returncode}: {said})")
