"""`uft convert` and `uft checkpoint` as a user types them: options that do not fit, and what is printed."""

from __future__ import annotations

import fcntl
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import whole_checkpoint
from peft import LoraConfig, get_peft_model
from runs import TIMEOUT_SECONDS, program
from tiny import build_tiny_model
from transformers import AutoModelForCausalLM

from uft_ds import cli
from uft_ds.commands.shared import console


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=False)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT saves it, trained enough to be seen."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    policy.save_pretrained(str(folder))
    return folder


def uft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["uft", *map(str, arguments)])
    monkeypatch.setattr(console, "width", 1000)  # nothing is folded
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_an_adapter_of_peft_is_merged_in_small_files(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--base, --max-shard-size and --dtype; compared unless told not to."""
    options = ("--base", base, "--max-shard-size", "40KB", "--dtype", "float32")
    code, out, err = uft(monkeypatch, capsys, "convert", adapter, tmp_path / "merged", *options)
    assert code == 0, err
    assert "100.00% of the adapter's log-ratios kept" in out
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.float32
    code, out, _ = uft(monkeypatch, capsys, "convert", adapter, tmp_path / "blind", *options, "--no-verify")
    assert code == 0
    assert "not compared with what was trained" in out
    assert [path.read_bytes() for path in files] == [
        path.read_bytes() for path in sorted((tmp_path / "blind").glob("model-*.safetensors"))
    ]


def test_two_conversions_never_write_one_folder(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second one is refused and harms nothing; what a killed one has left is no hindrance, and goes."""
    out, left = tmp_path / "merged", tmp_path / ".merged.tmp"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    with (tmp_path / ".merged.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = uft(monkeypatch, capsys, "convert", adapter, out, "--base", base)
        assert code == 2
        assert f"{out}: another conversion is writing it" in err
        assert (left / "model.safetensors").read_text() == "half"
    code, _, err = uft(monkeypatch, capsys, "convert", adapter, out, "--base", base)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-shard-size", "5 apples"), "--max-shard-size: '5 apples' given, expected a size such as 5GB or 500MB"),
        (("--adapter-config", "here"), "--adapter-config: only a DeepSpeed checkpoint needs it"),
        (("--to", "adapter", "--dtype", "float16"), "--dtype: --to adapter keeps the trained types"),
        (("--to", "adapter", "--max-shard-size", "1GB"), "--max-shard-size: of no use with --to adapter"),
        (("--to", "universal"), "an adapter alone; a universal checkpoint is of a run"),
        (("--base", "nope/nope/nope"), "base: nope/nope/nope: no such folder; it is looked for in "),
    ],
)
def test_options_that_do_not_fit_are_refused(
    adapter: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By name, with exit code 2, and nothing is written."""
    code, _, err = uft(monkeypatch, capsys, "convert", adapter, tmp_path / "out", *options)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nope", "nope: no such folder; expected a run, one of its checkpoints, an adapter in PEFT's format"),
        ("base", "holds a whole model; expected a run"),
        ("empty", "holds nothing of the kind; expected a run"),
    ],
)
def test_what_is_no_source_is_refused(
    base: Path,
    tmp_path: Path,
    what: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message says what was expected."""
    (tmp_path / "empty").mkdir()
    source = base if what == "base" else tmp_path / what
    code, _, err = uft(monkeypatch, capsys, "convert", source, tmp_path / "out")
    assert code == 2
    assert message in err


def test_another_base_than_the_adapter_names_is_said(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may be a copy, so it is taken."""
    shutil.copytree(base, tmp_path / "copy")
    code, out, _ = uft(monkeypatch, capsys, "convert", adapter, tmp_path / "out", "--base", tmp_path / "copy")
    assert code == 0
    assert f"warning: {adapter} says that its base is {base}; {tmp_path / 'copy'} is used" in out


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_checkpoint_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """`ls` shows every one; `verify` ends with 3 and the file's name where one is damaged, and with 2 where none is."""
    for step in (2, 4):
        whole_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
    code, out, _ = uft(monkeypatch, capsys, "checkpoint", command, tmp_path)
    assert code == 0
    assert "as they were written" in out or "as it was written" in out
    (tmp_path / "checkpoints" / "step-000002" / "trainer.json").write_text("TRAINER.JSON\n")
    code, out, err = uft(monkeypatch, capsys, "checkpoint", command, tmp_path)
    assert code == (3 if command == "verify" else 0)
    assert "step-000002/trainer.json: its content is not what was written" in out + err
    code, _, err = uft(monkeypatch, capsys, "checkpoint", command, tmp_path / "nowhere")
    assert code == 2
    assert "no such folder" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_nothing(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any signal removes the half-written model and its lock; what SIGKILL leaves goes with the next conversion."""
    words = ("convert", str(adapter), str(tmp_path / "merged"), "--base", str(base))
    process = program("converting", *words)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while "comparing\n" not in process.said()[0]:
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / ".merged.tmp" / "model.safetensors").stat().st_size > 0
        for _ in range(1 if number == signal.SIGINT else 2):  # launchers send several
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill_group()
    if number == signal.SIGKILL:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.lock", ".merged.tmp"]
        code, _, err = uft(monkeypatch, capsys, "convert", adapter, tmp_path / "merged", "--base", base)
        assert code == 0, err
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]
        return
    assert process.returncode == 130, said
    assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}" in said
    assert list(tmp_path.iterdir()) == []
