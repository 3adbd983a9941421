"""A run from the command line to a model that Hugging Face loads, and everything that may be wrong with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import TIMEOUT_SECONDS, forked, losses, started, uft, uft_anew, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from uft_ds.errors import EXIT_STOPPED
from uft_ds.host.ports import free_port
from uft_ds.recipe.file import load_recipe
from uft_ds.record.lines_of_steps import read_lines
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.samples import Sample


@pytest.fixture(scope="module")
def finished(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one `uft train` that has ended, with answers at its evaluations; in an interpreter of its own."""
    folder = tmp_path_factory.mktemp("finished")
    result = uft_anew("train", str(write_recipe(folder, tiny_qwen2, train__samples=3, train__sample_tokens=8)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every log-ratio is 0.0 nats" in result.stdout
    lines = [line for line in result.stdout.splitlines() if "packed sequences" in line and "so far" not in line]
    assert lines[:1] == ["checking packed sequences against the model's own forward"]
    (told,) = lines[1:]  # by one rank of the two
    assert re.fullmatch(r"before the first step: packed sequences differ by \S+ nats a token .*, checked in .+ s", told)
    assert "ETA" in result.stdout
    assert "evaluating held-out data after step 0: 0/5" in result.stdout
    assert "verdict: " in result.stdout
    return folder / "run"


def test_a_run_leaves_everything_that_belongs_to_it(finished: Path) -> None:
    """The folder holds the recipe, the environment, metrics, curves, logs of both ranks, one checkpoint and DONE."""
    names = {path.name for path in finished.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "curves.png", "report.html"}
    assert names >= {"log-rank0.txt", "log-rank1.txt", "latest", "DONE", "status.json"}
    assert load_recipe(str(finished / "recipe.yaml")).train.steps == 4
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-000004"]
    assert (finished / "latest").resolve().name == "step-000004"
    assert json.loads((finished / "environment.json").read_text())["packages"]["deepspeed"] != "not installed"


def test_a_log_says_a_warning_of_the_libraries_once(finished: Path) -> None:
    """torch calls two collectives deprecated whenever DeepSpeed uses them, hundreds of times a run."""
    for rank in range(2):
        said = re.findall(r"FutureWarning: (.*)", (finished / f"log-rank{rank}.txt").read_text(encoding="utf-8"))
        assert said
        assert len(said) == len(set(said))


def test_metrics_have_the_documented_names_and_sane_values(finished: Path) -> None:
    """Per-kind means for every step, loss 0.25 for instruction data at the start, held-out values at 0, 2 and 4."""
    lines = read_metrics(finished / "metrics.jsonl")
    steps = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    names = ("loss", "implicit_reward", "implicit_score", "log_ratio", "saturated", "response_tokens")
    for line in steps:
        assert all(f"{name}/{kind}" in line for name in names for kind in ("instruction", "score"))
        assert line["tokens_per_second"] > 0
        assert line["memory/peak_gib"] > 0
        assert line["responses/instruction"] + line["responses/score"] == 8
    assert steps[0]["loss/instruction"] == 0.25
    # Some held-out rows are training rows too: their reference was computed in another packing.
    assert abs(steps[0]["log_ratio/score"]) < 1e-5
    assert [line["reference/computed"] for line in steps] != [8.0] * 4
    assert steps[-1]["log_ratio/instruction"] != 0.0
    assert [line["step"] for line in lines if "held_out/loss" in line] == [0, 2, 4]
    assert steps[-1]["loss/instruction"] < 0.25


def test_answers_of_every_evaluation_are_kept(finished: Path) -> None:
    """Three held-out prompts, before the first step, after two and at the end; the report has first and last."""
    samples = read_lines(finished / "samples.jsonl", Sample)
    assert [(sample.step, sample.origin.partition(":")[2]) for sample in samples] == [
        (step, line) for step in (0, 2, 4) for line in ("1", "2", "3")
    ]
    assert [sample.prompt for sample in samples[:3]] == [f"user\nRate {i}\nassistant" for i in range(3)]
    assert [sample.response for sample in samples[:2]] == ["no", "no no"]
    assert [sample.answer for sample in samples[:3]] != [sample.answer for sample in samples[-3:]]
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "<h2>Verdict: " in report
    assert "<th>step 0</th><th>step 4</th>" in report
    assert "LoRA of rank 4 (alpha 8) on all-linear: " in report
    assert "4 with 32 responses" in report


def test_the_merged_model_is_the_adapter_on_the_base(finished: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """`convert` writes what Hugging Face loads: logits of base + adapter, and generation that ends with a turn."""
    from peft import PeftModel

    out = tmp_path / "merged"
    result = uft("convert", str(finished), "--to", "merged", str(out))
    assert result.returncode == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_qwen2), str(finished / "latest" / "adapter")
    )
    ids = tokenizer("Say 3", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, expected, untrained = (model(ids).logits for model in (merged, adapted, base))
    assert torch.allclose(trained, expected, atol=1e-4)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in GenerationConfig.from_pretrained(out).eos_token_id
    assert tokenizer.chat_template
    talk = uft("chat", str(out), "--prompt", "Say 3", "--max-new-tokens", "8")
    assert talk.returncode == 0, talk.stderr
    again = uft("convert", str(finished), str(out))
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_a_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    """One flipped bit in the adapter: exit 2, the file named, nothing written."""
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished, copy, symlinks=True)
    adapter = copy / "checkpoints" / "step-000004" / "adapter" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-5] ^= 1
    adapter.write_bytes(content)
    result = uft("convert", str(copy), str(tmp_path / "out"))
    assert result.returncode == 2
    assert "adapter_model.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten_unasked(finished: Path) -> None:
    """Exit 2 without --overwrite; the run stays as it was."""
    before = (finished / "metrics.jsonl").read_bytes()
    result = uft("train", str(finished.parent / "recipe.yaml"))
    assert result.returncode == 2
    assert "--overwrite" in result.stderr
    assert "Traceback" not in result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "deepspeed", "loss"),
    [
        pytest.param("bfloat16", "float32", "zero3_cpu", "mse", marks=pytest.mark.long),
        pytest.param("bfloat16", "bfloat16", "zero2", "nll", marks=pytest.mark.long),
    ],
)
def test_other_types_stages_and_losses_train(
    tiny_qwen2: Path, tmp_path: Path, dtype: str, lora_dtype: str, deepspeed: str, loss: str
) -> None:
    """bfloat16 under ZeRO-3 and ZeRO-2, plain SFT without a reference: runs end with a lower loss."""
    recipe = write_recipe(
        tmp_path,
        tiny_qwen2,
        model__dtype=dtype,
        lora__dtype=lora_dtype,
        deepspeed=deepspeed,
        objective__loss=loss,
    )
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    if loss == "mse":
        assert "every log-ratio is 0.0 nats" in result.stdout
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert lines[-1]["loss/instruction"] < lines[0]["loss/instruction"]


def test_too_many_non_finite_steps_end_the_run(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A learning rate that breaks the weights: steps are skipped and counted, then exit 3 and no DONE."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__lr=1e30, train__max_skipped_steps=1, train__warmup=0.0)
    result = uft("train", str(recipe))
    assert result.returncode == 3, result.stdout + result.stderr
    assert "max_skipped_steps" in result.stderr
    assert "Traceback" not in result.stderr
    assert "skipped" in (tmp_path / "run" / "log-rank0.txt").read_text()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.long
def test_workers_die_with_their_launcher(tiny_qwen2: Path, tmp_path: Path) -> None:
    """SIGKILL of `uft train` leaves no rank behind to write beside a restart."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__steps=100000)
    command = [sys.executable, "-m", "uft_ds", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not (metrics.exists() and len(losses(tmp_path / "run")) >= 1):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run never made a step"
            time.sleep(0.02)
        ranks = _processes_naming(str(tmp_path))
        assert len(ranks) >= 3, "launcher and two ranks"
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while _processes_naming(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _processes_naming(str(tmp_path)) == []


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_while_its_ranks_start_leaves_none(tiny_qwen2: Path, tmp_path: Path, number: int) -> None:
    """Ranks import for seconds before they can ask to die with their parent; a stop in that time reaches them too."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__steps=100000)
    command = [sys.executable, "-u", "-m", "uft_ds", "train", str(recipe)]
    # A shell's background jobs ignore SIGINT, and so would their children.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_heed_interrupts
    )
    assert process.stdout is not None
    try:
        said = ""
        while "training on 2 ranks" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(_processes_naming(f"{tmp_path / 'run'}")) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        said += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_STOPPED), said
    assert "Traceback" not in said
    deadline = time.monotonic() + 60
    while _processes_naming(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _processes_naming(str(tmp_path)) == []


def _processes_naming(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if text.encode() in command and state != "Z":
                found.append(int(entry.name))
    return found


def run_ranks_directly(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As torchrun would, without `uft train`'s preparation."""
    start = ["torch.distributed.run", "--nproc-per-node", "1", "--master-port", str(free_port())]
    return forked(*start, "-m", "uft_ds.train", str(recipe), *arguments)


@pytest.mark.long
def test_a_refused_start_does_not_touch_a_finished_run(finished: Path) -> None:
    """A launcher aimed at a finished run: refused, and its status, metrics and DONE stay as they were."""
    before = {name: (finished / name).read_bytes() for name in ("status.json", "metrics.jsonl", "recipe.yaml")}
    result = run_ranks_directly(finished.parent / "recipe.yaml")
    assert result.returncode != 0
    assert "--overwrite" in result.stderr
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_convert_follows_the_latest_link(finished: Path, tmp_path: Path) -> None:
    """`convert RUN/latest` means that run, wherever the link stands."""
    result = uft("convert", str(finished / "latest"), "--to", "adapter", str(tmp_path / "adapter"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_whose_base_has_moved_is_converted(finished: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """By --base, which must be the same by its content."""
    import shutil

    from uft_ds.errors import UserError
    from uft_ds.export.convert import convert_to_adapter

    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, copy, symlinks=True)
    shutil.copytree(tiny_qwen2, moved)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_qwen2), str(tmp_path / "gone")))
    with pytest.raises(UserError, match="gone: no such folder; if the run's base has moved, give --base"):
        convert_to_adapter(copy, tmp_path / "adapter")
    convert_to_adapter(copy, tmp_path / "adapter", base=str(moved))
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is not the base that the run was trained on"):
        convert_to_adapter(copy, tmp_path / "again", base=str(moved))


def test_a_merge_that_loses_what_was_trained_is_refused(finished: Path, tmp_path: Path) -> None:
    """Invariant 7: a delta far below bfloat16's steps is lost by the merge: exit 3, nothing left at OUT."""
    import shutil

    from checkpoints import files_below
    from safetensors.torch import load_file, save_file

    from uft_ds.checkpoint.manifest import write_manifest

    copy = tmp_path / "run"
    shutil.copytree(finished, copy, symlinks=True)
    checkpoint = copy / "checkpoints" / "step-000004"
    adapter = checkpoint / "adapter" / "adapter_model.safetensors"
    # Small enough to vanish beside weights of std 0.1, large enough that float32 keeps it.
    shrunk = {name: value * (0.003 if "lora_B" in name else 1.0) for name, value in load_file(adapter).items()}
    save_file(shrunk, adapter)
    write_manifest(checkpoint, files_below(checkpoint))
    result = uft("convert", str(copy), str(tmp_path / "out"), "--dtype", "bfloat16")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "--dtype float32" in result.stderr
    assert not (tmp_path / "out").exists()
    assert uft("convert", str(copy), str(tmp_path / "out"), "--dtype", "float32").returncode == 0


@pytest.mark.long
def test_a_killed_rank_is_named(tiny_qwen2: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank, as by the system when memory runs out: exit 1, and the message says which."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__steps=100000)
    process = started(recipe)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and len(losses(tmp_path / "run")) >= 1):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run never made a step"
            time.sleep(0.02)
        os.kill(_rank_process(tmp_path, rank=1), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill_group()
    assert process.returncode == 1
    assert "rank 1 was killed (signal 9)" in err


def _rank_process(folder: Path, *, rank: int) -> int:
    """By the title that a forked rank has."""
    for pid in _processes_naming(str(folder)):
        title = (Path("/proc") / str(pid) / "cmdline").read_bytes().rstrip(b"\0 ")
        if title.endswith(b"(rank %d)" % rank):
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.long
def test_deepspeeds_launcher_with_a_hostfile(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Two machines of one rank each, started by hand on each, train as one machine of two does."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    assert uft("train", str(write_recipe(alone, tiny_qwen2))).returncode == 0
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    recipe, port = write_recipe(together, tiny_qwen2), str(free_port())
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), "--no_ssh"),
                *("--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port),
                *("--module", "uft_ds.train", str(recipe)),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [launcher.communicate(timeout=TIMEOUT_SECONDS)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert losses(together / "run") == losses(alone / "run")
    assert (together / "run" / "log-rank1.txt").exists()
