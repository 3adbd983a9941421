"""What a policy that starts from an adapter must compute before the first step: log-ratios found without the engine.

They are computed before the launch, from the files, by PEFT's loading and Hugging Face's forward, on a few sequences
of the run's data sample. Each start of the run compares the engine's log-ratios with them (`training/start_check.py`),
so an adapter that is loaded wrongly, or scaled wrongly, is refused.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from uft_ds.data.example import Sequence
from uft_ds.data.sources import PreparedData
from uft_ds.data.store.selection import write_sample
from uft_ds.errors import UserError
from uft_ds.export.agreement import base_and_log_ratios, sequences_of_run
from uft_ds.export.quantised import nf4_of
from uft_ds.host.callbacks import OnProgress
from uft_ds.host.files import write_atomically
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.streams.adapter_files import written_as_peft_saves
from uft_ds.streams.identity import adapter_identity, local_folder


@dataclass(frozen=True)
class Start:
    """adapter: its identity. log_ratios: of base + adapter to the base, nats, of each response of `sample_of`."""

    adapter: str
    log_ratios: tuple[float, ...]


def start_of(settings: Settings, data: PreparedData, on_progress: OnProgress) -> Start | None:
    """What the policy must compute before the first step; None if it does not start from `start.adapter`.

    The base is read twice, one layer in memory at a time.

    Raises:
        UserError: the adapter or the base cannot be read.
    """
    if settings.start_adapter is None:
        return None
    adapter, model = Path(settings.start_adapter), settings.model
    with tempfile.TemporaryDirectory() as work:
        sample = Path(work) / "sample"
        sample.mkdir()
        write_sample_of(data, sample)
        _, log_ratios_R = base_and_log_ratios(
            local_folder(model.base, model.revision),
            written_as_peft_saves(adapter, Path(work)),
            sequences_of_run(sample),
            partial(on_progress, "computing the log-ratios of start.adapter"),
            nf4=nf4_of(model),
        )
    return Start(adapter_identity(adapter, "start.adapter"), tuple(log_ratios_R.tolist()))


def write_sample_of(data: PreparedData, folder: Path) -> None:
    """Write a few of a run's sequences, held-out ones if there are any; prompts without responses come last."""
    trained = sorted(data.train, key=lambda source: source.settings.asked is not None)
    write_sample(folder, [source.selection for source in (*data.held_out, *trained)])


def sample_of(folder: RunFolder) -> tuple[Sequence, ...]:
    """The sequences of a run's sample whose log-ratios are compared before the first step."""
    return sequences_of_run(folder.sample_data())


def write_start(folder: RunFolder, start: Start) -> None:
    """Record what the policy must compute before the first step, for every start of the run."""
    write_atomically(folder.start(), json.dumps(asdict(start)) + "\n")


def read_start(folder: RunFolder) -> Start:
    """What `write_start` recorded.

    Raises:
        UserError: the file cannot be read, or is not of the run's sample.
    """
    path = folder.start()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Start(str(content["adapter"]), tuple(float(value) for value in content["log_ratios"]))
        num_responses = sum(len(sequence.responses) for sequence in sample_of(folder))
        if len(found.log_ratios) != num_responses or not all(map(math.isfinite, found.log_ratios)):
            raise ValueError(f"expected {num_responses} finite log-ratios")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it says what start.adapter must compute: bring "
            "it back from a copy of the run"
        ) from None
    return found
