"""The kit for a GPU, on a CPU: each stage runs, and reports a failure where what it checks is broken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from gpu_check import (
    __main__ as kit,
)
from gpu_check import against_trl_here, attention, environment, exactness, kernels, quickstart, speed, waits, wheels
from gpu_check.report import Place, Report
from gpu_check.table import markdown
from suites import long_but

from uft_ds.kernels import rows_torch
from uft_ds.streams import packed_attention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(torch.device("cpu"), True, time.monotonic() + 600, tmp_path)


@pytest.fixture(autouse=True)
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the stages that try several, and of the exactness of all."""
    monkeypatch.setattr(exactness, "make_deterministic", lambda: None)
    families = attention.families(toy=True)
    for module in (attention, exactness):
        monkeypatch.setattr(module, "families", lambda *, toy: {"llama": families["llama"]})
    monkeypatch.setattr(exactness, "FAMILIES", ("llama",))


Stage = Callable[[Report, Place], None]


def found(stage: Stage, place: Place) -> Report:
    report = Report()
    stage(report, place)
    return report


STAGES = {
    "environment": environment.run,
    "kernels": kernels.run,
    "attention": attention.run,
    "exactness": exactness.run,
    "waits": waits.without_deepspeed,
}


@pytest.mark.parametrize("name", long_but(STAGES.keys() - {"attention"}, STAGES))
def test_a_stage_holds(name: str, place: Place) -> None:
    report = found(STAGES[name], place)
    assert report.problems == []
    assert report.facts or report.tables


# ---- planted faults


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth too much of what all tokens but the target contribute."""
    right = rows_torch.absorb_tile
    monkeypatch.setattr(rows_torch, "absorb_tile", lambda *args, **options: right(*args, **options) * 1.05)


def wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ten-thousandth too much probability outside the target."""
    right = rows_torch.absorb_tile

    def wrong(*args: Any, **options: Any) -> Any:
        result = right(*args, **options)
        args[3].others_R.mul_(1.0001)
        return result

    monkeypatch.setattr(rows_torch, "absorb_tile", wrong)


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention._alone
    monkeypatch.setattr(packed_attention, "_alone", lambda *args, **options: right(*args, **options) * 1.1)


def gradients_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel would that takes another way where no gradient is needed."""
    right = packed_attention._alone

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options) * (1.01 if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(packed_attention, "_alone", wrong)


def a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    right = waits.micro_step

    def waiting(*args: Any, **options: Any) -> Any:
        loss, *rest = right(*args, **options)
        float(loss)
        return loss, *rest

    monkeypatch.setattr(waits, "micro_step", waiting)


def no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_read", lambda tensor: None)


def an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    right = environment.found_version
    monkeypatch.setattr(environment, "found_version", lambda name: "0.1" if name == "peft" else right(name))


PLANTED = [
    ("environment", an_old_package, "peft 0.1 is installed"),
    pytest.param("kernels", wrong_gradient, "the gradient is", marks=pytest.mark.long),
    pytest.param("kernels", wrong_sums, "log-probs are", marks=pytest.mark.long),
    pytest.param("attention", wrong_attention, "from each sequence alone", marks=pytest.mark.long),
    ("exactness", gradients_change_numbers, "before the first step"),
    pytest.param("waits", a_read, "a micro-step waits 1.0 times", marks=pytest.mark.long),
    pytest.param("waits", no_counter, "a planted wait counts 0", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "plant", "said"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_found(
    name: str, plant: Any, said: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    problems = found(STAGES[name], place).problems
    assert problems
    assert any(said in problem for problem in problems), problems


def test_a_machine_without_a_gpu_is_a_problem(tmp_path: Path) -> None:
    """Unless toy sizes were asked for."""
    report = Report()
    report.demand(Place(torch.device("cpu"), False, 0.0, tmp_path).toy, "no GPU")
    assert report.problems == ["no GPU"]


def test_missing_and_wrong_packages_are_named() -> None:
    problems = environment.wrong_packages(["torch<1", "no-such-package>=2", "torch>=2"])
    assert problems[0].endswith("is installed, torch<1 is needed")
    assert problems[1] == "no-such-package is not installed, no-such-package>=2 is needed"
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("losses", "peak", "problems"), [([0.5], 3.0, 0), ([0.5], None, 0), ([0.5], 4.1, 1), ([0.5, math.nan], 4.1, 2)]
)
def test_speed_demands_finite_losses_and_the_planned_memory(
    losses: list[float], peak: float | None, problems: int
) -> None:
    report = Report()
    speed.judge(report, "a way", losses, peak, 4.0)
    assert len(report.problems) == problems


def test_a_run_that_fails_is_a_problem(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_uft", lambda *args: 3)
    problems = found(quickstart.run, place).problems
    assert problems == ["uft train ended with exit code 3", "the run has left no metrics"]


def test_losses_that_are_not_trls_are_a_problem(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.installed("trl")

    def sides(losses: dict[str, list[float]]) -> list[str]:
        def side(report: Report, place: Place, name: str) -> dict[str, Any]:
            return {"losses": losses[name], "tokens_per_second": 1.0}

        monkeypatch.setattr(against_trl_here, "_in_a_process", side)
        monkeypatch.setattr(against_trl_here.trl_sides, "write_adapter", lambda *args: None)
        return found(against_trl_here.run, place).problems

    assert sides({"uft_ds": [0.5, 0.4], "trl": [0.5, 0.4005]}) == []
    assert len(sides({"uft_ds": [0.5, 0.4], "trl": [0.5, 0.45]})) == 1


# ---- the driver


FAKES = {
    "passes": "report(True, [])",
    "fails": "report(True, ['it is wrong'])",
    "crashes": "report(False, []); os._exit(9)",
    "hangs": "report(False, []); signal.signal(signal.SIGTERM, signal.SIG_IGN); child(); time.sleep(60)",
    "says nothing": "",
}
FAKE = """
import json, os, signal, subprocess, sys, time
def report(finished, problems):
    facts = {"done": 1, "pid": os.getpid()}
    open(sys.argv[1], "w").write(json.dumps(dict(finished=finished, problems=problems, facts=facts, tables={})))
def child():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    print("child", subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[kit.Stage]:
    """Stages that do what their names say, of a second each."""

    def command(stage: kit.Stage, out: Path, allowed: float, *, cpu: bool) -> list[str]:
        return [sys.executable, "-u", "-c", f"{FAKE}\n{FAKES[stage.name]}", str(out)]

    monkeypatch.setattr(kit, "command_of", command)
    monkeypatch.setattr(kit, "GRACE", 0.5)
    return [kit.Stage(name, 1.0) for name in FAKES]


@pytest.mark.long
def test_a_stage_that_fails_stops_no_other(fakes: list[kit.Stage], tmp_path: Path, capfd: Any) -> None:
    """What a stage had found before it crashed or its time was up is kept; its children are ended."""
    assert kit.main([str(tmp_path), "--budget", "8"], fakes) == 1
    values = json.loads((tmp_path / "gpu_check.json").read_text())
    how = {stage["stage"]: stage["how"] for stage in values["stages"]}
    assert how == {
        "passes": "passed", "fails": "failed", "crashes": "crashed", "hangs": "timed out", "says nothing": "crashed"
    }  # fmt: skip
    assert values["stages"][3]["facts"]["done"] == 1
    assert values["stages"][3]["seconds"] < 7
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED (fails failed, crashes crashed, hangs timed out, says nothing crashed)")
    log = (tmp_path / "log.txt").read_text()
    child = int(log.partition("child ")[2].split()[0])
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        _alive(child)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.md", "log.txt"]
    assert "it is wrong" in (tmp_path / "gpu_check.md").read_text()


def _alive(pid: int) -> None:
    """Raises ProcessLookupError for a process that is gone, or dead and not waited for."""
    os.kill(pid, 0)
    if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
        raise ProcessLookupError(pid)


def test_all_that_hold_pass(fakes: list[kit.Stage], tmp_path: Path, capfd: Any) -> None:
    assert kit.main([str(tmp_path), "--only", "passes"], fakes) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("PASSED: ")


def test_no_time_left_is_a_result(fakes: list[kit.Stage], tmp_path: Path) -> None:
    """The budget holds for all stages together; a stage that got none is said, and is no pass."""
    started = time.monotonic()
    assert kit.main([str(tmp_path), "--budget", "1.5", "--only", "hangs", "passes"], fakes) == 1
    assert time.monotonic() - started < 8
    values = json.loads((tmp_path / "gpu_check.json").read_text())
    assert values["stages"][0]["how"] == "left out"


def test_the_default_budget_is_divided_among_the_stages() -> None:
    assert sum(stage.seconds for stage in kit.STAGES) == kit.BUDGET == 600


@pytest.mark.parametrize("arguments", [["--budget", "0"], ["--only", "kernel"]])
def test_bad_options_are_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        kit.main([str(tmp_path), *arguments])
    assert refused.value.code == 2


def test_the_page_shows_what_was_found() -> None:
    stage = kit.Outcome("a", "failed", 1.0, 2.0, ["x | y"], {"n": 0.123456}, {"rows": [{"a": 1}, {"a": 2, "b": True}]})
    text = markdown({"passed": False, "seconds": 1.0, "stages_to_come": 0, "stages": [vars(stage)]})
    assert "\nFAILED in 1 s.\n" in text
    assert "| a | failed | 1 of 2 | 1 |" in text
    assert "* PROBLEM: x \\| y" in text
    assert "| n | 0.1235 |" in text
    assert "Rows:\n\n| a | b |\n| --- | --- |\n| 1 | - |\n| 2 | yes |" in text


def test_nothing_has_passed_while_stages_are_to_come(tmp_path: Path) -> None:
    """A run that is ended from outside leaves what it had found, and no word of success."""
    with (tmp_path / "log.txt").open("w") as file:
        kit.write_results(tmp_path, [kit.Outcome("a", "passed", 1.0, 2.0)], kit.Log(file), to_come=2)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["passed"] is False
    assert "NOT DONE, 2 stages to come" in (tmp_path / "gpu_check.md").read_text()


def test_a_report_is_complete_at_any_moment(tmp_path: Path) -> None:
    """A number that JSON does not have is kept as its name."""
    report = Report(tmp_path / "report.json")
    report.row("t", value=math.nan)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "finished": False, "problems": [], "facts": {}, "tables": {"t": [{"value": "nan"}]}
    }  # fmt: skip
    report.demand(math.nan <= 1, "a NaN fails")
    report.finish()
    kept = json.loads((tmp_path / "report.json").read_text())
    assert (kept["finished"], kept["problems"]) == (True, ["a NaN fails"])


def test_packages_of_torch_are_never_collected() -> None:
    collected = [name for name in ("torch", "triton", "nvidia-cublas-cu12", "cuda-toolkit", "torchtitan", "numpy")
                 if not wheels.OF_TORCH.match(name)]  # fmt: skip
    assert collected == ["torchtitan", "numpy"]


# ---- the script


def script(*arguments: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"UFT_GPU_CHECK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(folder), "--cpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.long
def test_the_script_runs_stages_on_a_cpu(tmp_path: Path) -> None:
    """From any folder, and with wheels of which none fits."""
    wheels_folder = tmp_path / "wheels"
    wheels_folder.mkdir()
    result = script(
        "--wheels", str(wheels_folder), "--only", "environment", "kernels", folder=tmp_path / "out", seconds=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == f"PASSED: results in {tmp_path / 'out' / 'gpu_check.md'}"
    assert "holds no wheels" in result.stdout


@pytest.mark.long
def test_all_stages_hold_on_a_cpu(tmp_path: Path) -> None:
    """In the time of a GPU; not one is left out."""
    result = script(folder=tmp_path / "out", seconds=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    values = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [stage["stage"] for stage in values["stages"]] == [stage.name for stage in kit.STAGES]
