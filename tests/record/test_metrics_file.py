"""metrics.jsonl: one JSON object a line, there at once, whatever the numbers are."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from uft_ds.record.metrics import model_flops_utilization, peak_memory_gib
from uft_ds.record.metrics_file import MetricsWriter, damaged_metrics, read_metrics
from uft_ds.streams.nf4 import quantise


def writer_in(folder: Path, *trackers: str) -> MetricsWriter:
    return MetricsWriter(folder, trackers, run_name="test", config={})


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Parsed as a strict reader does: Python alone takes NaN and Infinity."""
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_a_step_with_its_metrics(tmp_path: Path) -> None:
    """`step` first, then the names as given, in full double precision."""
    writer = writer_in(tmp_path)
    writer.write(1, {"loss": 0.1 + 0.2, "loss/instruction": 1.0})
    writer.write(2, {"held_out/loss": 1e-300})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.30000000000000004, "loss/instruction": 1.0},
        {"step": 2, "held_out/loss": 1e-300},
    ]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, ')


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    """A skipped step has a NaN or infinite norm; its line is still JSON that any reader takes."""
    writer = writer_in(tmp_path)
    writer.write(3, {"loss": math.nan, "grad_norm": math.inf, "log_ratio/score": -math.inf, "lr": 1e-5})
    writer.close()
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"step": 3, "loss": None, "grad_norm": None, "log_ratio/score": None, "lr": 1e-5}
    ]


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    """Whoever follows the file need not wait for the end of the run, nor is a line lost where it is killed."""
    writer = writer_in(tmp_path)
    for step in range(1, 4):
        writer.write(step, {"loss": 1.0})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.count("\n") == step
        assert text.endswith("}\n")
    writer.close()


def test_a_second_writer_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    """The file is appended to, never emptied."""
    for step in (1, 2):
        writer = writer_in(tmp_path)
        writer.write(step, {"loss": float(step)})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    """A killed run may have written half a line: every prefix of the file reads as its whole lines."""
    writer = writer_in(tmp_path)
    for step in (1, 2):
        writer.write(step, {"loss": float(step)})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    whole = read_metrics(tmp_path / "metrics.jsonl")
    for length in range(len(text) + 1):
        (tmp_path / "torn.jsonl").write_text(text[:length])
        assert read_metrics(tmp_path / "torn.jsonl") == whole[: text[:length].count("\n")]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    """Every metric is a scalar under its own name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = writer_in(tmp_path, "tensorboard")
    writer.write(5, {"loss": 0.25, "loss/score": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "loss/score"}
    assert [(event.step, event.value) for event in events.Scalars("loss/score")] == [(5, 0.5)]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """A run goes on after step 1: what was written of steps 2 and 3 is written again, once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after_step, values in ((None, {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.2}), (1, {2: 0.31, 3: 0.21})):
        writer = MetricsWriter(tmp_path, ("tensorboard",), run_name="test", config={}, after_step=after_step)
        for step, value in values.items():
            writer.write(step, {"loss": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 2)) for event in events.Scalars("loss")]
    assert found == [(0, 0.5), (1, 0.4), (2, 0.31), (3, 0.21)]


def test_peak_memory_is_in_gib() -> None:
    """A process with torch in it holds between 50 MiB and 64 GiB: a wrong unit would be off by 1024."""
    assert 0.05 < peak_memory_gib() < 64


def test_no_utilization_is_claimed_without_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """None on a CPU, and on a GPU that the table does not name."""
    model = torch.nn.Linear(10, 10, bias=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_flops_utilization(model, 1e3, reference_share=1.0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card 9000")
    assert model_flops_utilization(model, 1e3, reference_share=1.0) is None


def test_utilization_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 parameters, 989e9 tokens a second, 4 FLOPs each (6 with the reference, 6 trained): 0.4 (0.6) of 989e12."""
    model = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert model_flops_utilization(model, 989e9, reference_share=0.0) == pytest.approx(0.4)
    assert model_flops_utilization(model, 989e9, reference_share=1.0) == pytest.approx(0.6)
    assert model_flops_utilization(model.requires_grad_(True), 989e9, reference_share=0.0) == pytest.approx(0.6)


def test_of_a_base_in_nf4_the_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the bytes, of which a layer has half as many; the head stays as it is. So also where ZeRO-3 divides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Qwen2Config(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).requires_grad_(False)
    weights = sum(p.numel() for p in model.parameters())
    quantise(model)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * weights
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert model_flops_utilization(model, 989e12, reference_share=0.0) == pytest.approx(4 * weights)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined] # as DeepSpeed notes it
        parameter.data = parameter.data.new_empty(0)
    assert model_flops_utilization(model, 989e12, reference_share=0.0) == pytest.approx(4 * weights)


def test_of_a_mixtures_experts_those_count_that_a_token_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model itself: two of four experts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).requires_grad_(False)
    experts = 4 * 3 * 8 * 4
    active = sum(p.numel() for p in model.parameters()) - experts // 2
    assert model_flops_utilization(model, 989e12, reference_share=0.0) == pytest.approx(4 * active)


class WandbStandIn:
    """What Weights & Biases does with steps: its own only rises, and a line of a lower one is dropped.

    A metric that has another one as its step metric is drawn over that one's values.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.axis: dict[str, str | None] = {}
        self._highest = -1

    def init(self, *, id: str, resume: str, **_: Any) -> WandbStandIn:  # noqa: A002 - as wandb names it
        assert resume == "allow"
        self.ids.append(id)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axis[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step < self._highest:
            return
        self._highest = max(self._highest, self._highest + 1 if step is None else step)
        self.lines.append(data)

    def finish(self) -> None:
        pass


def test_wandb_keeps_the_steps_that_a_resume_makes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went to step 3 and goes on after step 1 sends steps 2 and 3 again, to the same run, over `step`."""
    wandb = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ((1, 2, 3), (2, 3)):
        writer = writer_in(tmp_path, "wandb")
        for step in steps:
            writer.write(step, {"loss": float(step)})
        writer.close()
    assert [line["step"] for line in wandb.lines] == [1, 2, 3, 2, 3]
    assert wandb.lines[-1] == {"step": 3, "loss": 3.0}
    assert wandb.axis["*"] == "step"
    assert wandb.ids == [(tmp_path / "wandb-id").read_text()] * 2


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xff",
        b"null",
        b"[]",
        b"5",
        b"{}",
        b'{"step": "1"}',
        b'{"step": 2, "loss": "x"}',
        b"\0" * 30,
        b"",
        b"[" * 9999,
    ],
)
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, line: bytes) -> None:
    """As a failing disk or a full one leaves it; the lines around it are read."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + line + b'\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert [found["step"] for found in read_metrics(path)] == [1, 2]
    assert damaged_metrics(path) == [2]
    assert damaged_metrics(tmp_path / "none") == []
