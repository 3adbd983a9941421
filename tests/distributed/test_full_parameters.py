"""All parameters trained: a run on two ranks against plain torch, its resume, and the model that is written."""

import json
import shutil
from pathlib import Path

import pytest
from plain_torch import assert_moved_alike, trained_by_plain_torch
from runs import (
    assert_goes_on_from_its_middle,
    forked,
    losses,
    numbers,
    recipe_in,
    settings_of_run,
    uft,
    write_rows,
)
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import open_data
from uft_ds.training.steps import steps_of


@pytest.fixture(scope="module", params=long_but([True], [False, True]), ids=["own-head", "tied-head"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run has ended; its base ties embedding and head, or does not."""
    folder = tmp_path_factory.mktemp("full")
    base = build_tiny_model(folder / "base", tied=request.param)
    recipe = recipe_in(
        folder, base, lora=None, train__lr=1e-3, train__keep_checkpoints=9, objective__reward_shift="none"
    )
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every log-ratio is 0.0 nats" in result.stdout
    return folder


def test_full_parameters_are_trained_as_by_plain_torch(finished: Path) -> None:
    """Losses of all steps, and how far each parameter moved; the written model holds what was trained."""
    settings = settings_of_run(finished / "recipe.yaml")
    steps = steps_of(settings, open_data(settings, RunFolder(settings.output)))
    expected, expected_losses = trained_by_plain_torch(settings, steps, len(steps))
    result = uft("convert", str(finished / "run"), str(finished / "model"))
    assert result.returncode == 0, result.stderr
    assert "parameters read back as they were trained" in result.stdout
    assert losses(finished / "run") == pytest.approx(expected_losses, rel=1e-5)
    model, start = (AutoModelForCausalLM.from_pretrained(finished / name) for name in ("model", "base"))
    assert_moved_alike(model, expected, start)


def test_the_reference_is_computed_before_the_first_step_alone(finished: Path) -> None:
    """No step forwards a reference; the checkpoint of the start knows that of all responses, held-out ones too."""
    lines = numbers(finished / "run")
    assert {line["reference/computed"] for line in lines if "reference/computed" in line} == {0.0}
    known = load_file(finished / "run" / "checkpoints" / "step-000000" / "reference.safetensors")
    assert max(len(tensor) for tensor in known.values()) >= 37 - 5  # scored rows are held out, too


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle, whose weights no rank has ever held whole."""
    assert_goes_on_from_its_middle(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("convert", "RUN", "OUT", "--to", "adapter"), "so there is no adapter"),
        (("convert", "RUN", "OUT", "--to", "universal"), "all parameters were trained"),
        (("generate", "RUN", "--benchmark", "mt_bench", "--questions", "ASKED", "--out", "OUT"), "there is no adapter"),
        (("train", "RECIPE", "lora={}", "output=OUT", "start.adapter=RUN"), "so it holds no adapter"),
    ],
)
def test_what_needs_an_adapter_says_that_there_is_none(
    finished: Path, tmp_path: Path, command: tuple[str, ...], message: str
) -> None:
    question = {"question_id": 1, "category": "writing", "turns": ["Say 1", "Again"]}
    asked = write_rows(tmp_path / "asked.jsonl", [question])
    places = {"RUN": str(finished / "run"), "RECIPE": str(finished / "recipe.yaml"), "ASKED": str(asked)}
    words = [places.get(word, word).replace("=RUN", f"={finished / 'run'}") for word in command]
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    result = forked("uft_ds", *words)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_reference_that_is_not_finite_is_named_before_the_first_step(tmp_path: Path) -> None:
    """By its row; a step could not compute it again. The base's weights are finite, and one token overflows."""
    base = build_tiny_model(tmp_path / "base", "granite")  # it multiplies embeddings
    weights = load_file(base / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(base)("Z")["input_ids"]
    weights["model.embed_tokens.weight"][token] = 3e38
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    recipe = recipe_in(tmp_path, base, lora=None, objective__reward_shift="none")
    rows = tmp_path / "scored.jsonl"
    write_rows(rows, [{"prompt": f"Rate {i}", "response": "Z" if i == 9 else "no", "score": 0.5} for i in range(16)])
    result = uft("train", str(recipe), "data.sources.1.allow_one_score=true")
    assert result.returncode == 3, result.stdout + result.stderr
    assert f"{rows}:10: the reference's log-prob is not finite" in result.stderr
    assert not any("grad_norm" in line for line in numbers(tmp_path / "run"))


@pytest.mark.long
def test_other_ranks_go_on(finished: Path, tmp_path: Path) -> None:
    """On one rank and by ZeRO-2: the same losses to rounding."""
    for options in (("launch.ranks=1",), ("deepspeed=zero2",)):
        folder = tmp_path / options[0].partition("=")[2] / "run"
        shutil.copytree(finished / "run", folder, symlinks=True)
        (folder / "DONE").unlink()
        for name in ("step-000004", "step-000006"):
            shutil.rmtree(folder / "checkpoints" / name)
        result = uft("train", str(finished / "recipe.yaml"), "--resume", f"output={folder}", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        assert losses(folder) == pytest.approx(losses(finished / "run"), rel=1e-4)
        assert json.loads((folder / "latest" / "trainer.json").read_text())["step"] == 6
