"""A base in NF4 on two ranks: each ZeRO stage bit for bit, a whole run and its resume, what is refused, and online."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain_torch import logps_of
from ranks import run_on_ranks
from runs import assert_goes_on_from_its_middle, recipe_in, settings_of_run, uft
from safetensors.torch import load_file
from test_online_run import online_recipe, train
from tiny import build_tiny_model
from torch import Tensor
from toy import UFT, forwarded, toy_model, toy_step
from transformers import AutoModelForImageTextToText
from wrappers import build_wrapper

from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading
from uft_ds.export.quantised import nf4_of_adapter
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import open_data
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.nf4 import Nf4Base, held_in_nf4
from uft_ds.streams.policy import base_of

FLOAT32 = Nf4Base(torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("nf4") / "base", "qwen2", tied=False)


def a_step(base: Path, zero: dict[str, Any], **options: Any) -> tuple[list[dict[str, Tensor]], float, Any]:
    """On one of the ranks: the log-probs of each micro-batch before and after one step, its gradient's norm, and the
    types of the base's weights in the engine."""
    config = deepspeed_config(read_deepspeed_file("zero2"), dtype=torch.float32, max_grad_norm=1e6)
    config["zero_optimization"] |= zero
    with partitioned_loading(config):
        model = toy_model(base, quantization="nf4", gradient_checkpointing=True, **options)
    layer_class = decoder_layer_class(base_of(model.policy))
    engine = Engine(model, config, layer_class=layer_class, weight_decay=0.0)
    kinds = {(str(p.dtype), hasattr(p, "ds_id")) for p in model.parameters() if not p.requires_grad}
    step, found = toy_step(8), []
    terms, batches = count_terms(UFT, step.responses), engine.micro_batches(step, 64)
    for number, batch in enumerate(batches, start=1):
        logps = forwarded(engine, batch)
        found.append({name: values.detach().clone() for name, values in logps.items()})
        loss, _ = micro_batch_loss(UFT, batch, terms, logps)
        engine.backward(loss, is_last=number == len(batches))
    assert held_in_nf4(model.policy) == FLOAT32  # what a checkpoint notes
    norm = engine.step(1e-2).grad_norm
    with engine.evaluating():
        found += [{name: v.clone() for name, v in forwarded(engine, batch).items()} for batch in batches]
    return found, norm, kinds


def in_every_way(base: Path) -> list[Any]:
    """On one of the ranks, in one start."""
    gathered = {"stage": 3, "stage3_param_persistence_threshold": 0}
    on_host = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return [
        a_step(base, {}),
        a_step(base, {}, reference_mode="separate"),
        a_step(base, gathered),
        a_step(base, gathered | on_host),
    ]


def test_codes_are_gathered_bit_for_bit(base: Path) -> None:
    """ZeRO-2, ZeRO-3 and ZeRO-3 with the base on the host, in lockstep and by separate forwards: the same log-probs of
    both streams before and after a step, bit for bit. Under ZeRO-3 the codes are sharded as bytes."""
    for found in run_on_ranks(in_every_way, 2, base):
        (expected, norm, kinds), *others = found
        assert kinds == {("torch.uint8", False), ("torch.float32", False)}
        assert [others[number][2] for number in (1, 2)] == [{("torch.uint8", True), ("torch.float32", True)}] * 2
        for other, other_norm, _ in others:
            assert other_norm == pytest.approx(norm, rel=1e-12)
            for one, two in zip(expected, other, strict=True):
                assert set(one) == {"policy", "reference"}
                assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run has ended."""
    folder = tmp_path_factory.mktemp("nf4_run")
    options = {"model__quantization": "nf4", "deepspeed": "zero2", "train__keep_checkpoints": 9}
    result = uft("train", str(recipe_in(folder, base, **options)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "before the first step: every log-ratio is 0.0 nats" in result.stdout
    return folder


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle: metrics, adapter and optimiser; then it is done, as `uft status` says."""
    folder = tmp_path / "run"
    assert_goes_on_from_its_middle(finished, folder)
    assert "done" in uft("status", str(folder)).stdout
    assert (folder / "report.html").exists()


@pytest.mark.long
def test_a_run_records_its_rounding_and_is_converted_by_it(finished: Path, tmp_path: Path) -> None:
    """In its identity; the merged model keeps the log-ratios, the adapter's card says on which base it belongs."""
    assert json.loads((finished / "run" / "identity.json").read_text())["base"]["quantization"] == "nf4"
    merged = uft("convert", str(finished / "run"), str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr
    assert "100.00% of the adapter's log-ratios kept" in merged.stdout
    adapter = uft("convert", str(finished / "run"), str(tmp_path / "adapter"), "--to", "adapter")
    assert adapter.returncode == 0, adapter.stderr
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "The adapter belongs on the linear layers of its base in NF4" in card
    assert "load_in_4bit=True" in card


@pytest.mark.long
def test_a_copied_adapter_says_on_which_base_it_belongs(finished: Path, base: Path, tmp_path: Path) -> None:
    """Away from its run, a checkpoint's adapter is merged into the rounded base too: the same model, bit for bit."""
    copied = shutil.copytree(finished / "run" / "latest" / "adapter", tmp_path / "copied")
    assert nf4_of_adapter(copied) == FLOAT32
    for source, name in ((finished / "run", "of_run"), (copied, "of_copy")):
        result = uft("convert", str(source), str(tmp_path / name), "--base", str(base))
        assert result.returncode == 0, result.stderr
    of_run, of_copy = (load_file(tmp_path / name / "model.safetensors") for name in ("of_run", "of_copy"))
    assert all(torch.equal(of_run[name], of_copy[name]) for name in of_run)


@pytest.mark.long
def test_another_rounding_is_another_run(finished: Path, tmp_path: Path) -> None:
    """No resume and no start without it; a start with it, whose log-ratios are those that PEFT computes."""
    recipe, run = str(finished / "recipe.yaml"), finished / "run"
    resumed = uft("train", recipe, "--resume", "model.quantization=null")
    assert resumed.returncode == 2
    assert "model.quantization: none now, nf4 when the run began" in resumed.stderr
    output = f"output={tmp_path / 'run'}"
    plain = uft("train", recipe, "--dry-run", output, f"start.adapter={run}", "model.quantization=null")
    assert plain.returncode == 2
    assert "was trained on its base in NF4, and model.quantization is not given" in plain.stderr
    more = uft("train", recipe, output, f"start.adapter={run}", "train.steps=2", "launch.ranks=1")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "from what PEFT and Hugging Face compute of it" in more.stdout


@pytest.mark.long
def test_the_policy_answers_online_in_nf4(base: Path, tmp_path: Path) -> None:
    """By the ranks' own policy, under ZeRO-3; each answer is trained on with log-ratios of the same base."""
    recipe = online_recipe(tmp_path, base, model__quantization="nf4")
    result = train(recipe, "train.steps=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every log-ratio is 0.0 nats" in result.stdout
    # A policy on the plain base begins with the same adapter, by its hash, and is another policy.
    plain = ("model.quantization=null", f"output={tmp_path / 'plain'}", "train.steps=1")
    replayed = train(recipe, "--replay", str(tmp_path / "run"), *plain)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "step 1: another policy than the one that is trained now has given the recorded answers" in replayed.stdout


def held_out_logps(run: Path) -> dict[str, float]:
    """As the run has evaluated them after its last step, by `file:line`."""
    with (run / "held_out.csv").open(encoding="utf-8") as file:
        return {line["origin"]: float(line["logp"]) for line in csv.DictReader(file)}


@torch.no_grad()
def logps_by(model: Any, run: Path) -> dict[str, float]:
    """The same by Hugging Face's own forward of each sequence."""
    (source,) = open_data(settings_of_run(run / "recipe.yaml"), RunFolder(run)).held_out
    sequences = [sequence for place in range(len(source.selection)) for sequence in source.selection.unit(place, 0)]
    return {
        response.origin: float(logp)
        for sequence in sequences
        for response, logp in zip(sequence.responses, logps_of(model, sequence), strict=True)
    }


@pytest.mark.long
def test_a_model_of_images_and_text_is_converted_from_nf4(tmp_path: Path) -> None:
    """The merged model, and the adapter on weights that bitsandbytes itself has rounded, say what the run has said."""
    import bitsandbytes

    base, run = build_wrapper(tmp_path / "base", "gemma3"), tmp_path / "run"
    result = uft("train", str(recipe_in(tmp_path, base, model__quantization="nf4")))
    assert result.returncode == 0, result.stdout + result.stderr
    for name, options in {"merged": (), "adapter": ("--to", "adapter")}.items():
        result = uft("convert", str(run), str(tmp_path / name), *options)
        assert result.returncode == 0, result.stderr
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    rounded = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    for layer in rounded.get_decoder().layers.modules():
        if isinstance(layer, torch.nn.Linear):
            coding = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
            codes, state = bitsandbytes.functional.quantize_4bit(layer.weight.data, **coding)
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(codes, state)
    expected = held_out_logps(run)
    for model in (merged, PeftModel.from_pretrained(rounded, str(tmp_path / "adapter"))):
        assert logps_by(model, run) == pytest.approx(expected, abs=1e-4)
