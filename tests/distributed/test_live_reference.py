"""All parameters trained beside a frozen copy of the base: where the copy's shards are, its numbers, and its runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import REAL_PARTITIONING
from plain_torch import LogRatios, assert_moved_alike, kl_of, trained_by_plain_torch
from ranks import run_on_ranks
from recorded_steps import steps_of_record
from reference_traffic import counting
from runs import assert_same_shards, losses, numbers, recipe_in, settings_of_run, uft
from safetensors.torch import load_file
from test_online_run import online_recipe
from tiny import build_tiny_model
from toy import UFT, toy_sequences
from transformers import AutoModelForCausalLM

from uft_ds.checkpoint.shard_names import shard_name
from uft_ds.checkpoint.shards import Shards, write_shard
from uft_ds.data.mixture import Step
from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.engine.engine import Engine
from uft_ds.engine.optimizer_state import Piece, pieces_of, restore
from uft_ds.host.files import write_atomically
from uft_ds.known.cache import Known, fill
from uft_ds.objectives.reference import HowReference
from uft_ds.record.report import SilentReporter
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.build import build_engine
from uft_ds.run.prepare import open_data
from uft_ds.streams.model import UFTModel
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step
from uft_ds.training.steps import steps_of

OF_COPY = "reference."
"""What `UFTModel` puts before the names of the copy's parameters."""
TOKENS = 64


def partitioning_file(folder: Path, stage: int = 3) -> Path:
    """A DeepSpeed file under which a tiny model is really partitioned and gathered again."""
    zero = {"stage": stage, "reduce_bucket_size": 10_000, **(REAL_PARTITIONING if stage == 3 else {})}
    path = folder / f"stage{stage}.json"
    write_atomically(path, json.dumps({"zero_optimization": zero}))  # each rank does, and reads it at once
    return path


def built(folder: Path, *, live: bool, file: Path) -> tuple[Engine, UFTModel]:
    """The engine as a run builds it."""
    overrides = (f"reference.cache={str(not live).lower()}", f"deepspeed={file}")
    settings = with_deepspeed_file(settings_of_run(folder / "recipe.yaml", *overrides))
    assert settings.copies_reference == live
    return build_engine(settings, SilentReporter())


def uneven_steps() -> list[Step]:
    """Of seven sequences each: the two ranks have other numbers of tokens, and the same number of micro-batches."""
    return [Step(number, toy_sequences(7, seed=number)) for number in range(3)]


# ---- where the shards are


@contextmanager
def noting_places() -> Iterator[tuple[dict[int, tuple[str, bool]], set[int]]]:
    """Within the block: by a parameter's `ds_id`, (where its `zero.Init` keeps shards, page-locked or not); and the
    addresses of tensors that DeepSpeed has page-locked. On a CPU nothing is: a copy stands for it."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    accelerator: Any = get_accelerator()
    places: dict[int, tuple[str, bool]] = {}
    locked: dict[int, torch.Tensor] = {}
    convert, lock = Init._convert_to_deepspeed_param, accelerator.pin_memory

    def converting(self: Any, parameter: Any) -> None:
        convert(self, parameter)
        is_own = isinstance(self.remote_device, torch.device) and self.remote_device == self.local_device
        places[parameter.ds_id] = ("device" if is_own else str(self.remote_device), self.pin_memory)

    def locking(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied = tensor.clone()
        locked[copied.data_ptr()] = copied  # kept, so that no other tensor gets this address
        return copied

    Init._convert_to_deepspeed_param, accelerator.pin_memory = converting, locking
    try:
        yield places, locked.keys()  # type: ignore[misc]
    finally:
        Init._convert_to_deepspeed_param, accelerator.pin_memory = convert, lock


def places_of_shards(folder: Path) -> dict[str, Any]:
    """Of a rank: what is told of each parameter after the start, after a step, and after a checkpoint is restored."""
    from deepspeed.utils import z3_leaf_module

    with noting_places() as (places, locked):
        engine, model = built(folder, live=True, file=partitioning_file(folder))
        named = dict(model.named_parameters())
        copied = {name: p for name, p in named.items() if name.startswith(OF_COPY)}

        def told() -> dict[str, Any]:
            return {
                "by": {name: places[p.ds_id] for name, p in named.items()},
                "locked": {name: p.ds_tensor.data_ptr() in locked for name, p in named.items()},
                "elements": {name: p.ds_tensor.numel() for name, p in named.items()},
                "values": {name: p.ds_tensor.clone() for name, p in copied.items()},
                "addresses": {name: p.ds_tensor.data_ptr() for name, p in copied.items()},
                "gathered": [name for name, p in copied.items() if p.ds_status.name == "AVAILABLE"],
            }

        moments = [told()]
        method = Method(engine, UFT, Known.of_reference("separate"), TOKENS)
        with counting() as counters:
            run_step(method, uneven_steps()[0], 1e-3)
        moments.append(told())
        pieces = [
            Piece(p.name, p.shape, p.start, {k: t.clone() for k, t in p.tensors.items()})
            for p in pieces_of(engine.deepspeed)
        ]
        write_shard(folder / shard_name(engine.rank, 2), pieces, {})
        torch.distributed.barrier()
        restore(engine.deepspeed, Shards(folder).read, updates=1)
        run_step(method, uneven_steps()[1], 1e-3)
        moments.append(told())
    with engine.evaluating(), engine.whole():
        gathered = {name for name, p in named.items() if p.ds_status.name == "AVAILABLE"}
    layers = [*model.policy.get_decoder().layers, *model.reference.get_decoder().layers]
    return {
        "moments": moments,
        "sizes": {name: p.ds_numel for name, p in named.items()},
        "trained": {name for name, p in named.items() if p.requires_grad},
        "saved": {piece.name for piece in pieces},
        "leaves": [z3_leaf_module(layer) for layer in layers],
        "gathers": counters.gathers,
        "whole": gathered,
        "heads": [
            m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model.policy, model.reference)
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe on a tiny model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("live")
    base = build_tiny_model(folder / "base", tied=True)
    recipe_in(folder, base, lora=None, train__lr=1e-3, train__keep_checkpoints=9, objective__reward_shift="none")
    return folder


def test_the_copys_shards_stay_in_page_locked_host_memory(folder: Path) -> None:
    """In one engine, after the start, a step and a restored checkpoint: the policy's shards are on the rank's own
    device, and each of the copy's is the page-locked host tensor that its own `zero.Init` made, its bits unchanged."""
    ranks = run_on_ranks(places_of_shards, 2, folder)
    for found in ranks:
        of_copy = {name for name in found["sizes"] if name.startswith(OF_COPY)}
        of_policy = {name for name in found["sizes"] if name not in of_copy}
        assert {name.removeprefix(OF_COPY) for name in of_copy} == {n.removeprefix("policy.") for n in of_policy}
        assert found["trained"] == found["saved"] == of_policy
        assert found["heads"] == [True, True]  # tied within each, and two distinct sets of names
        assert found["leaves"] == [True] * 4
        assert found["whole"] == of_policy  # to answer prompts
        first = found["moments"][0]
        for moment in found["moments"]:
            assert {moment["by"][name] for name in of_copy} == {("cpu", True)}
            assert {moment["by"][name] for name in of_policy} == {("device", False)}
            assert {name for name, is_locked in moment["locked"].items() if is_locked} == of_copy
            assert all(moment["elements"][name] == -(-found["sizes"][name] // 2) for name in of_copy)
            assert moment["addresses"] == first["addresses"]
            assert all(torch.equal(moment["values"][name], first["values"][name]) for name in of_copy)
            assert moment["gathered"] == []
    assert ranks[0]["gathers"] == ranks[1]["gathers"] > 0


# ---- its numbers


def three_steps(folder: Path, stage: int, live: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the parameters after them; the cache is filled before the first, as a run does."""
    engine, model = built(folder, live=live, file=partitioning_file(folder, stage))
    steps = uneven_steps()
    how: HowReference = "separate" if live else "cached"
    known = Known.of_reference(how)
    if not live:
        fill(engine, known, steps, TOKENS, flush_every=9)
    model.leave_base()
    method = Method(engine, UFT, known, TOKENS)
    found = [run_step(method, step, 1e-2).metrics["loss"] for step in steps]
    with engine.gathered_trainable() as named:
        return found, {name: tensor.clone() for name, tensor in named.items()}


def every_way(folder: Path) -> dict[tuple[int, bool], Any]:
    return {(stage, live): three_steps(folder, stage, live) for stage in (3, 2) for live in (True, False)}


def test_the_copy_says_what_the_cache_says(folder: Path) -> None:
    """Bit for bit, losses and all parameters, where the cache was filled in the rows that are trained on; under ZeRO-3
    and, where each rank holds a whole copy, under ZeRO-2."""
    for found in run_on_ranks(every_way, 2, folder):
        for stage in (3, 2):
            (losses_of, of_copy), (expected, of_cache) = found[stage, True], found[stage, False]
            assert losses_of == expected
            assert len(set(losses_of)) == 3
            assert all(torch.equal(of_copy[name], of_cache[name]) for name in of_cache)


# ---- its runs


@pytest.fixture(scope="module")
def shifted(folder: Path) -> Path:
    """The folder of a run with `reward_shift: kl`, which forwards the copy for joined prompts, and for what the cache
    does not know yet."""
    result = uft("train", str(folder / "recipe.yaml"), "objective.reward_shift=kl")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "loading the reference" in result.stdout
    assert "computing the reference before the first step" not in result.stdout
    assert "every log-ratio is 0.0 nats" in result.stdout
    return folder / "run"


@pytest.mark.long
def test_a_shifted_run_is_that_of_plain_torch(shifted: Path) -> None:
    """Losses of all steps, how far each parameter moved, and what the shift was."""
    settings = settings_of_run(shifted / "recipe.yaml")
    steps, shifts = steps_of(settings, open_data(settings, RunFolder(shifted))), []

    def shift_of(step: Step, log_ratios: LogRatios) -> float:
        shifts.append(kl_of(step, log_ratios))
        return shifts[-1]

    expected, expected_losses = trained_by_plain_torch(settings, steps, len(steps), shift_of=shift_of)
    assert losses(shifted) == pytest.approx(expected_losses, rel=1e-5)
    recorded = [line["reward_shift"] for line in numbers(shifted) if "reward_shift" in line]
    assert recorded == pytest.approx([0.1 * shift for shift in shifts], rel=1e-4, abs=1e-9)
    assert max(shifts) > 0.1
    result = uft("convert", str(shifted), str(shifted.parent / "model"))
    assert result.returncode == 0, result.stderr
    model, start = (AutoModelForCausalLM.from_pretrained(shifted.parent / name) for name in ("model", "base"))
    assert_moved_alike(model, expected, start)


def test_the_cache_spares_the_copy_what_it_knows(shifted: Path) -> None:
    """Of data that comes again; the copy is in no checkpoint, and known by the content of the base's files."""
    computed = [line["reference/computed"] for line in numbers(shifted) if "reference/computed" in line]
    assert computed[0] > 0
    assert computed[-1] == 0
    for checkpoint in (shifted / "checkpoints").glob("step-*"):
        shards = list((checkpoint / "optimizer").glob("*.safetensors"))
        assert len(shards) == 2
        assert not any(OF_COPY in name for shard in shards for name in load_file(shard))
    identity = json.loads((shifted / "identity.json").read_text())
    assert identity["base"]


@pytest.mark.long
def test_a_shifted_run_goes_on_bit_for_bit(shifted: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle: the copy is the base again, not the policy of the checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(shifted, folder, symlinks=True)
    (folder / "DONE").unlink()
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(folder / "checkpoints" / name)
    recipe = str(shifted.parent / "recipe.yaml")
    result = uft("train", recipe, "--resume", "objective.reward_shift=kl", f"output={folder}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming from step-000002" in result.stdout
    assert numbers(folder) == numbers(shifted)
    assert_same_shards(folder, shifted)


@pytest.mark.long
def test_an_online_run_is_that_of_plain_torch(folder: Path, tmp_path: Path) -> None:
    """The policy's own answers, as they are recorded, beside fixed data; and from its middle bit for bit."""
    recipe = online_recipe(tmp_path, folder / "base", lora=None, train__lr=1e-3, objective__reward_shift="none")
    run = tmp_path / "run"
    result = uft("train", str(recipe), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    settings = settings_of_run(run / "recipe.yaml")
    steps = steps_of_record(settings, run)
    _, expected = trained_by_plain_torch(settings, steps, len(steps))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    (again / "DONE").unlink()
    for checkpoint in sorted((again / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(checkpoint)
    result = uft("train", str(recipe), "--resume", f"output={again}", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(again) == losses(run)
    assert_same_shards(again, run)
    lines = [line for line in numbers(again) if "rollouts/replayed" in line]
    assert lines[-1]["rollouts/replayed"] == 1.0  # by this very policy: its hash is that of the first time
