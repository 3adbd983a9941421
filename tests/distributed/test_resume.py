"""Invariant 4: a run that was killed and goes on is the run that was not, bit for bit."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import needs
import pytest
import torch
import yaml
from rich.console import Console
from runs import (
    STEPS,
    TIMEOUT_SECONDS,
    adapter,
    assert_same_run,
    killed_at,
    numbers,
    ranks_of,
    recipe_in,
    settings_of_run,
    started,
    uft,
    wait_for_the_end_of,
    write_rows,
)

from uft_ds.checkpoint.folder import newest_whole, step_of
from uft_ds.errors import UserError
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.resume import nothing_to_do, prepare_resume, resumed_from
from uft_ds.run.start import rehearse


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    result = uft("train", str(recipe_in(folder, tiny_qwen2)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


def test_a_killed_run_goes_on_bit_for_bit(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Metrics, adapter and DONE; with the reference cache, which another run has filled meanwhile."""
    recipe = recipe_in(tmp_path, tiny_qwen2)
    killed_at(recipe, 5)
    assert not (tmp_path / "run" / "DONE").exists()
    newest, _ = newest_whole(tmp_path / "run")
    assert newest is not None
    assert newest.name in ("step-000002", "step-000004"), "the last one may not have been whole yet"
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resuming from {newest.name}" in result.stdout
    assert_same_run(tmp_path / "run", unbroken)


def test_a_damaged_checkpoint_is_passed_over(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """One flipped bit: the one before is used, and that is said; the other is set aside. A link that leads nowhere is
    never trusted, and mended. Where none is left, nothing is changed and each is named."""
    recipe = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    (run / "latest").unlink()
    (run / "latest").symlink_to("checkpoints/step-000099")
    shard = next((run / "checkpoints" / "step-000006" / "optimizer").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    said = resumed(recipe)
    damage = f"checkpoint step-000006 cannot be used: {shard}: its content is not what was written"
    assert said == [
        f"warning: {damage}; step-000004 is used",
        "resuming from step-000004",
    ]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000004", "step-000006.damaged"]
    assert resumed_from(RunFolder(run)) == run / "checkpoints" / "step-000004" == (run / "latest").resolve()
    assert {line["step"] for line in read_metrics(run / "metrics.jsonl")} == {0, 1, 2, 3, 4}
    (run / "checkpoints" / "step-000004" / "trainer.json").unlink()
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(
        UserError, match="none of the run's checkpoints can be used\ncheckpoint step-000004 cannot be used"
    ):
        resumed(recipe)
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.long
@pytest.mark.parametrize("shift", ["kl", "prompt_mean", "center"])
def test_other_shifts_and_a_beta_schedule_go_on_bit_for_bit(tiny_qwen2: Path, tmp_path: Path, shift: str) -> None:
    """What is not `ema` with a constant beta: `kl`, which held-out data take from the step before, means over a prompt
    whose answers are forwarded ahead of a step with a cache, all with a beta that depends on the step."""
    centers = shift == "center"
    changes: dict[str, object] = {
        "objective__reward_shift": "none" if centers else shift, "objective__center": "prompt" if centers else "none",
        "objective__beta_schedule": "cosine", "objective__beta_end": 3.0,
    }  # fmt: skip
    if shift != "kl":
        rows = [{"prompt": "Rate it", "response": f"no {i}", "score": i % 3 / 2} for i in range(24)]
        changes["data__sources"] = [{"format": "jsonl", "path": str(write_rows(tmp_path / "same_prompt.jsonl", rows))}]
    straight = recipe_in(tmp_path / "straight", tiny_qwen2, **changes)
    result = uft("train", str(straight))
    assert result.returncode == 0, result.stdout + result.stderr
    assert any(line.get("reward_shift") for line in numbers(tmp_path / "straight" / "run")), "nothing was shifted"
    recipe = recipe_in(tmp_path / "killed", tiny_qwen2, **changes)
    killed_at(recipe, 5)
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("resuming from step-00000[24]", result.stdout)
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "straight" / "run")


def test_a_run_that_is_done_is_left_alone(unbroken: Path) -> None:
    """Exit code 0 for whoever starts it again without looking; no file is touched."""
    before = {path: path.lstat().st_mtime_ns for path in unbroken.rglob("*")}
    result = uft("train", str(unbroken.parent / "recipe.yaml"), "--resume")
    assert result.returncode == 0, result.stderr
    assert f"{unbroken} is done: there is nothing to resume" in result.stdout
    assert {path: path.lstat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_a_folder_that_cannot_be_written_is_named(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """A read-only mount, for root may write everywhere else."""
    with needs.tmpfs(tmp_path / "read-only", "64m") as folder:
        shutil.copytree(unbroken, folder / "run", symlinks=True)
        (folder / "run" / "DONE").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        refused = uft("train", str(unbroken.parent / "recipe.yaml"), "--resume", f"output={folder / 'run'}")
        assert refused.returncode == 2, refused.stdout
        assert f"error: output: {folder / 'run'} cannot be written (Read-only file system)" in refused.stderr


def test_without_a_run_or_a_checkpoint_it_starts_at_step_0(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """And says so."""
    recipe = recipe_in(tmp_path / "new", tiny_qwen2)
    run = tmp_path / "new" / "run"
    assert resumed(recipe) == [f"{run} holds no run: starting at step 0"]
    assert resumed_from(RunFolder(run)) is None
    recipe, run = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy"), tmp_path / "copy" / "run"
    shutil.rmtree(run / "checkpoints")
    assert resumed(recipe) == [f"{run} holds no checkpoint: starting at step 0"]
    assert not (run / "metrics.jsonl").exists()


def test_a_run_is_never_deleted_for_its_checkpoints_are_gone(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Only damaged ones left, or none of a run that is done, or none of a run by another recipe: refused."""
    recipe, run = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy"), tmp_path / "copy" / "run"
    aside = run / "checkpoints" / "step-000004.damaged"
    (run / "checkpoints" / "step-000004").rename(aside)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of the run's checkpoints can be used\nstep-000004"):
        resumed(recipe)
    shutil.rmtree(aside)
    with pytest.raises(UserError, match=r"train\.lr: 0\.5 now, 0\.01 when"):
        resumed(recipe, "train.lr=0.5")
    (run / "DONE").touch()
    with pytest.raises(UserError, match=r"done, and its checkpoints are gone.* --overwrite trains it again"):
        resumed(recipe)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_file_that_is_gone_is_named(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Not taken for another recipe; also where the recipe says it by a relative path."""
    recipe = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy")
    (tmp_path / "copy" / "scored.jsonl").unlink()
    recipe.write_text(recipe.read_text().replace(f"{tmp_path / 'copy' / 'scored.jsonl'}", "scored.jsonl"))
    with pytest.raises(UserError, match=r"^data.sources.1.path: scored.jsonl: no such file or folder here; the run be"):
        resumed(recipe)


def test_a_torn_line_of_lost_metrics_is_cut_off(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """What is written next must be a line of its own."""
    recipe, run = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy"), tmp_path / "copy" / "run"
    metrics = (run / "metrics.jsonl").read_bytes()
    first, second, *_ = metrics.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(first + second[:-5])
    resumed(recipe)
    assert (run / "metrics.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=0.5", "train.lr: 0.5 now, 0.01 when the run began"),
        ("objective.beta=0.3", "objective.beta: 0.3 now, 0.1 when the run began"),
        ("data.sources.0.examples=8", "data.sources.0.examples: 8 now, none when the run began"),
    ],
)
def test_another_recipe_is_refused(unbroken: Path, override: str, message: str) -> None:
    """Key, both values, and what to do; also for a run that is done, and nothing is changed."""
    recipe = unbroken.parent / "recipe.yaml"
    with pytest.raises(UserError) as caught:
        nothing_to_do(settings_of_run(recipe, override))
    assert message in str(caught.value)
    with pytest.raises(UserError) as caught:
        resumed(recipe, override)
    assert message in str(caught.value)
    assert "give output=PATH for another run" in str(caught.value)
    assert (unbroken / "DONE").exists()


def resumed(recipe: Path, *overrides: str) -> list[str]:
    """Prepare to go on, without launching anything; what was said."""
    said: list[str] = []
    *_, lock = prepare_resume(settings_of_run(recipe, *overrides), say=said.append)
    lock.close()
    return said


def unfinished_copy(unbroken: Path, base: Path, folder: Path) -> Path:
    """A run and its data in another place, by their own copy of the base; its recipe."""
    shutil.copytree(unbroken.parent, folder, symlinks=True)
    recipe = recipe_in(folder, base)
    (folder / "run" / "DONE").unlink()
    stored = folder / "run" / "recipe.yaml"
    before = yaml.safe_load(stored.read_text())["model"]["base"]
    stored.write_text(stored.read_text().replace(str(unbroken.parent), str(folder)).replace(before, str(base)))
    return recipe


def flip_a_weight(base: Path) -> None:
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_the_template(base: Path) -> None:
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    template = base / "chat_template.jinja"
    if template.exists():
        template.write_text(template.read_text() + "{# the same, in other words #}")
    else:
        config["chat_template"] += "{# the same, in other words #}"
        path.write_text(json.dumps(config))


def swap_two_tokens(base: Path) -> None:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["q"] = vocabulary["q"], vocabulary["x"]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (flip_a_weight, "base.weights: "),
        (change_the_template, "data.sources.0.chat_template: "),
        (swap_two_tokens, "data.sources.0.tokenizer: "),
        (None, "data.sources.1.content: "),
    ],
)
def test_other_inputs_are_refused(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path, change: Callable[[Path], None] | None, key: str
) -> None:
    """By content, naming both, under the same paths: weights, chat template, tokenizer, rows; nothing is changed."""
    base, folder = tmp_path / "base", tmp_path / "copy"
    shutil.copytree(tiny_qwen2, base)
    recipe = unfinished_copy(unbroken, base, folder)
    if change is not None:
        change(base)
    else:
        with (folder / "scored.jsonl").open("a") as file:
            file.write('{"prompt": "one", "response": "more", "score": 0.5}\n')
    before = {path: path.lstat().st_mtime_ns for path in (folder / "run").rglob("*")}
    with pytest.raises(UserError) as caught:
        resumed(recipe)
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(key)]
    assert re.fullmatch(r".+: .+ now, .+ then", line)
    assert {path: path.lstat().st_mtime_ns for path in (folder / "run").rglob("*")} == before


def test_other_versions_and_lost_metrics_are_said(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """The run goes on, for neither makes it wrong."""
    recipe = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    environment = json.loads((run / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "metrics.jsonl").write_text("")
    versions, metrics, going_on = resumed(recipe)
    now = importlib.metadata.version("torch")
    assert (
        versions
        == f"warning: the run began with other versions, so it is not resumed bit for bit: torch {now} now, 1.0 then"
    )
    assert metrics.startswith(f"warning: {run / 'metrics.jsonl'}: 0 bytes, ")
    assert going_on == "resuming from step-000006"


@pytest.mark.long
def test_other_ranks_go_on(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """On one rank, and at another ZeRO stage: the same data in the same order, losses equal to rounding."""
    recipe = recipe_in(tmp_path, tiny_qwen2)
    killed_at(recipe, 3)
    result = uft("train", str(recipe), "--resume", "launch.ranks=1", "deepspeed=zero2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "was saved by 2 ranks, now there are 1" in result.stdout
    for ours, theirs in zip(numbers(tmp_path / "run"), numbers(unbroken), strict=True):
        assert ours["step"] == theirs["step"]
        for name, value in theirs.items():
            undefined = value is None  # a correlation of responses that are all equal
            assert ours[name] == (None if undefined else pytest.approx(value, rel=1e-4, abs=1e-5)), name


def test_more_steps_are_said_and_recorded(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Of a run that is done: how many, and the learning rate that comes next; fewer than are done are refused."""
    assert nothing_to_do(settings_of_run(unbroken.parent / "recipe.yaml", "train.steps=9")) is None
    recipe, run = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy"), tmp_path / "copy" / "run"
    (run / "DONE").touch()
    with pytest.raises(UserError, match=r"train\.steps: 5 now, 6 before: that is 5 steps, and 6 are done"):
        resumed(recipe, "train.steps=5")
    assert (run / "DONE").exists()
    steps, schedule, going_on = resumed(recipe, "train.steps=9")
    assert steps == "train.steps: 9 now, 6 before: 9 steps, 6 of them done"
    assert "the learning rate of the remaining steps follows the schedule over 9 steps" in schedule
    assert going_on == "resuming from step-000006"
    assert not (run / "DONE").exists()
    assert load_settings(str(run / "recipe.yaml")).train.steps == 9
    (entry,) = json.loads((run / "environment.json").read_text())["resumes"]
    assert (entry["step"], entry["changed"]) == (6, {"train.steps": [6, 9]})
    assert resumed(recipe, "train.steps=9") == ["resuming from step-000006"], "its checkpoints are still its own"


@pytest.mark.long
def test_a_grown_run_with_a_constant_rate_is_the_longer_run_bit_for_bit(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Four steps to the end, then six: metrics and adapter of six steps at once."""
    changes = {"train__schedule": "constant", "train__warmup": 0.0}
    straight = recipe_in(tmp_path / "straight", tiny_qwen2, **changes)
    result = uft("train", str(straight))
    assert result.returncode == 0, result.stdout + result.stderr
    recipe = recipe_in(tmp_path / "grown", tiny_qwen2, **changes)
    for overrides in (("train.steps=4",), ("--resume",)):
        result = uft("train", str(recipe), *overrides)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "every step so far is also that of a run of 6 steps" in result.stdout
    assert_same_run(tmp_path / "grown" / "run", straight.parent / "run")


def test_a_dry_resume_says_what_a_resume_would(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Warnings, checkpoint and steps, or the refusal; no file of the run is touched."""
    recipe = unfinished_copy(unbroken, tiny_qwen2, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    (run / "metrics.jsonl").write_text("")
    before = {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")}
    text = io.StringIO()
    settings = settings_of_run(recipe, "train.steps=9")
    found = rehearse(settings, Console(file=text, width=500), resume=True)
    assert found is not None
    assert (found.num_steps, found.done) == (9, 6)
    said = text.getvalue()
    assert f"warning: {run / 'metrics.jsonl'}: 0 bytes, " in said
    assert "train.steps: 9 now, 6 before: 9 steps, 6 of them done" in said
    assert "would resume from step-000006" in said
    assert "6 steps are done, the remaining 3 hold 24" in said
    with pytest.raises(UserError, match=r"train\.lr: 0\.5 now, 0\.01 when"):
        rehearse(settings_of_run(recipe, "train.lr=0.5"), Console(file=text), resume=True)
    assert {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")} == before


@pytest.mark.long
def test_a_run_from_another_ones_adapter_goes_on_bit_for_bit(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """`start.adapter: RUN` begins where that run ended, with the base as reference; killed, it goes on as itself."""
    changes = {"start": {"adapter": str(unbroken)}, "objective__reward_shift": "none"}
    straight = recipe_in(tmp_path / "straight", tiny_qwen2, **changes)
    result = uft("train", str(straight))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "before the first step: the log-ratios of start.adapter are" in result.stdout
    first, last = numbers(straight.parent / "run")[0], numbers(unbroken)[-1]
    assert (first["step"], last["step"]) == (0, STEPS)
    for name in ("log_ratio/score", "rank_correlation/score", "length_correlation/score", "implicit_reward/score"):
        assert first[f"held_out/{name}"] == pytest.approx(last[f"held_out/{name}"], abs=1e-4), name
    recipe = recipe_in(tmp_path / "killed", tiny_qwen2, **changes)
    killed_at(recipe, 3)
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "killed" / "run", straight.parent / "run")


KILLS, STEPS_UNDER_FIRE = 5, 30


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again(tiny_qwen2: Path, tmp_path: Path) -> None:
    """SIGKILL of everything or of one rank, at random moments: in a start's first seconds, between steps, while a
    checkpoint is written. In the end it is the run that was never touched."""
    changes = {"train__steps": STEPS_UNDER_FIRE, "train__checkpoint_every": 1}
    straight = recipe_in(tmp_path / "straight", tiny_qwen2, **changes)
    assert uft("train", str(straight)).returncode == 0
    recipe = recipe_in(tmp_path / "killed", tiny_qwen2, **changes)
    folder, rng = tmp_path / "killed" / "run", random.Random("kills")
    went_on_from: list[int] = []
    for _ in range(KILLS):
        newest, _ = newest_whole(folder)
        went_on_from.append(0 if newest is None else step_of(newest))
        if rng.random() < 0.3:
            moment = after_seconds(rng.uniform(0.5, 10.0))
        else:
            moment = soon_after_step(folder, went_on_from[-1] + rng.randint(1, 5), rng.uniform(0.0, 0.3))
        kill(recipe, moment, one_rank=rng.random() < 0.5, wait=rng.random() < 0.5)
    assert len(set(went_on_from)) >= 3, f"the kills say little: the starts went on from steps {went_on_from}"
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not ranks_of(folder), "no orphan"
    found, expected = numbers(folder), numbers(straight.parent / "run")
    assert found == expected
    ours, theirs = adapter(folder), adapter(straight.parent / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


def after_seconds(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


def soon_after_step(folder: Path, step: int, seconds: float) -> Callable[[], bool]:
    """Once that step's line is in the metrics, and so much later."""

    def is_now() -> bool:
        path = folder / "metrics.jsonl"
        if not path.exists() or not any(line["step"] >= step for line in read_metrics(path)):
            return False
        time.sleep(seconds)
        return True

    return is_now


def kill(recipe: Path, is_now: Callable[[], bool], *, one_rank: bool, wait: bool) -> None:
    """Start or go on, and SIGKILL when it is time; the run may have ended by then.

    wait: until no rank is left; otherwise the next start meets those that are about to die.
    """
    process = started(recipe, "--resume")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not is_now() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ranks = ranks_of(recipe.parent / "run")
        if one_rank and ranks:
            with suppress(ProcessLookupError):
                os.kill(random.choice(ranks), signal.SIGKILL)
            process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if wait:
            wait_for_the_end_of(recipe.parent / "run")
