"""The real wandb without a network, as on a compute node: what lies in its files afterwards."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uft_ds.record.metrics_file import MetricsWriter

METRICS = {"loss": 0.5, "tasks/sums/score": 0.25, "held_out/calibration_error/score": 0.125}


BLOCK, HEADER = 32_768, 7
"""Bytes of a block of LevelDB's log format, in which wandb writes, and of a head, of each piece and of the file."""


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a log, in pieces: checksum (4 bytes), length (2), type (1: all, 2: first, 3: middle, 4: last)."""
    data, place, record = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def history_of(file: Path) -> list[dict[str, Any]]:
    """The lines that wandb would send, without what it adds itself."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines = []
    for data in records_of(file):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append({name: value for name, value in items.items() if not name.startswith("_")})
    return lines


def test_both_trackers_have_the_same_names_and_steps_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 3, then, resumed after step 1, steps 2 and 3 again: each start is an offline run of the same id, whose
    steps rise; TensorBoard shows each step once."""
    import wandb  # late: a second of every worker

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps, after in (((1, 2, 3), None), ((2, 3), 1)):
        writer = MetricsWriter(
            tmp_path, ("tensorboard", "wandb"), run_name="tiny", config={"train": {"lr": 1e-5}}, after_step=after
        )
        for step in steps:
            writer.write(step, {name: value + step for name, value in METRICS.items()})
        writer.close()
    wandb.teardown()  # ends the process that writes: under load `finish` has returned before the file was whole
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert wandb.run is None, "finished"
    assert [history_of(file) for file in files] == [
        [{"step": step} | {name: value + step for name, value in METRICS.items()} for step in steps]
        for steps in ((1, 2, 3), (2, 3))
    ]
    assert len({file.stem for file in files}) == 1, "one id"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(METRICS)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
