"""The steps of an online run, made of its record as the run has made them."""

from __future__ import annotations

from pathlib import Path

from uft_ds.data.asked import Asked
from uft_ds.data.mixture import Step, Unit
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.rollouts.record import RecordFolder
from uft_ds.rollouts.source import sequences_of
from uft_ds.run.prepare import open_data
from uft_ds.training.steps import mixed_sources, steps_of


def steps_of_record(settings: Settings, run: Path) -> list[Step]:
    """All of them; the answers are the policy's own."""
    data = open_data(settings, RunFolder(run))
    plan, pools = steps_of(settings, data), [source.selection for source in mixed_sources(settings, data)]

    def made(n: int) -> Step:
        record = RecordFolder(run / "rollouts").read(n + 1)
        assert record is not None
        groups = iter(record.groups)

        def unit_of(source: int, unit: int, pair_id: int) -> Unit:
            pool = pools[source]
            return sequences_of(next(groups), is_own=True) if isinstance(pool, Asked) else pool.unit(unit, pair_id)

        return plan.step_of(n, unit_of)

    return [made(n) for n in range(len(plan))]
