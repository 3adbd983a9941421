"""What a run on fake tensors says is saved, against what a real one saves."""

import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PACKED
from suites import long_but
from tiny import CLASSES, build_tiny_model, rope_of
from torch import Tensor
from toy import logps_by_name, toy_model, toy_sequences

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.reference import HowForwarded
from uft_ds.planning.activations import _Live, activations_of
from uft_ds.planning.memory import head_saved_bytes
from uft_ds.planning.shapes import shipped_config
from uft_ds.planning.structure import Lora, structure_of
from uft_ds.streams.load import attention_implementation, check_base

LORA = Lora(4, 8.0, "all-linear", "float32")  # as `toy_model` has it


def really_saved(folder: Path, batch: Any, **options: Any) -> int:
    """Bytes of the storages that autograd keeps of one forward in this process; weights left out."""
    model = toy_model(folder, **options)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps_R = logps_by_name(model, batch)
    del logps_R
    return sum(sizes.values())


def assert_planned_as_saved(
    folder: Path, sequences: tuple[Sequence, ...], gradient_checkpointing: bool, mode: HowForwarded
) -> None:
    """Within 2%, under the attention that `auto` is on a CPU."""
    batch, config = micro_batch(sequences), check_base(str(folder), None)
    measured = really_saved(folder, batch, gradient_checkpointing=gradient_checkpointing, reference_mode=mode)
    planned = activations_of(
        structure_of(config, LORA),
        lengths=batch.lengths,
        dtype="float32",
        gradient_checkpointing=gradient_checkpointing,
        lockstep=mode == "lockstep",
        attention=attention_implementation("auto", torch.float32, config),
        under_zero3=False,
    )
    planned_bytes = planned.saved_bytes + head_saved_bytes(len(batch.targets_N), 64, item_bytes=4)
    assert planned_bytes == pytest.approx(measured, rel=0.02)


FAST = ("gemma2", "gpt_neox")


def in_every_way(architectures: Iterable[str]) -> Iterator[Any]:
    """All four for each architecture; the fast tests have two of them, which hold each value of both keys."""
    for architecture, gradient_checkpointing, mode in product(architectures, (True, False), ("lockstep", "separate")):
        is_fast = architecture in FAST and gradient_checkpointing == (mode == "lockstep")
        yield pytest.param(architecture, gradient_checkpointing, mode, marks=() if is_fast else pytest.mark.long)


@pytest.mark.parametrize(("architecture", "gradient_checkpointing", "mode"), in_every_way(CLASSES))
def test_saved_bytes_are_those_of_a_real_forward(
    tmp_path: Path, architecture: Any, gradient_checkpointing: bool, mode: Any
) -> None:
    """Within 2%, for each architecture, checkpointed or not, in either mode of the reference."""
    folder = build_tiny_model(tmp_path, architecture)
    assert_planned_as_saved(folder, toy_sequences(6, longest=120), gradient_checkpointing, mode)


def really_live(folder: Path, batch: Any, **options: Any) -> int:
    """Bytes of the storages that are alive after one forward in this process, the log-probs aside."""
    model = toy_model(folder, gradient_checkpointing="selective", **options)
    with _Live() as live:
        held = [parameter.detach() for parameter in model.parameters()]
        before = live.now
        logps = logps_by_name(model, batch)
        del held
        return live.now - before - sum(logps_R.nbytes for logps_R in logps.values())


@pytest.mark.parametrize("architecture", long_but(["gemma2"], ["qwen2", "llama", "gemma2"]))
@pytest.mark.parametrize("mode", ["lockstep", "separate"])
def test_what_the_selective_mode_keeps_is_planned(tmp_path: Path, architecture: Any, mode: Any) -> None:
    """Within 5%: autograd's hooks do not see what torch keeps for it, so all that is alive is counted."""
    folder = build_tiny_model(tmp_path, architecture)
    batch, config = micro_batch(toy_sequences(6, longest=120)), check_base(str(folder), None)
    measured = really_live(folder, batch, reference_mode=mode)
    planned = activations_of(
        structure_of(config, LORA),
        lengths=batch.lengths,
        dtype="float32",
        gradient_checkpointing="selective",
        lockstep=mode == "lockstep",
        attention=attention_implementation("auto", torch.float32, config),
        under_zero3=False,
    )
    planned_bytes = planned.saved_bytes + head_saved_bytes(len(batch.targets_N), 64, item_bytes=4)
    assert planned_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("gradient_checkpointing", long_but([True], [True, False]))
@pytest.mark.parametrize("architecture", long_but(["gemma3_text"], ["gemma2", "gemma3_text"]))
def test_layers_with_a_window_save_what_full_ones_do(
    tmp_path: Path, architecture: Any, gradient_checkpointing: bool
) -> None:
    """Five layers with a window, then a full one, in rows so long that masks and scores weigh as much as the rest:
    within 2% again, though the plan runs only the first two layers."""
    layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    folder = build_tiny_model(tmp_path, architecture, num_hidden_layers=6, layer_types=layer_types)
    assert_planned_as_saved(folder, toy_sequences(20, longest=120), gradient_checkpointing, "lockstep")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_look_at_the_length_are_planned(tmp_path: Path, kind: str) -> None:
    """As transformers changes them in the forward: within 2% of a real one, which stays below their limit."""
    folder = build_tiny_model(tmp_path, "llama", rope_parameters=rope_of(kind, 512))
    assert_planned_as_saved(folder, toy_sequences(6, longest=120), True, "lockstep")


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_experts_are_planned_in_every_type(kind: str) -> None:
    """float32 saves up to twice the bytes of bfloat16: integers and what the router computes do not change."""
    structure = structure_of(PACKED[kind], Lora(4, 8.0, ["q_proj"], "float32"))
    saved = {
        dtype: activations_of(
            structure,
            lengths=(64,),
            dtype=dtype,
            gradient_checkpointing=False,
            lockstep=False,
            attention="sdpa",
            under_zero3=True,
        ).saved_bytes
        for dtype in ("float32", "bfloat16")
    }
    assert 1.4 < saved["float32"] / saved["bfloat16"] < 2.0


def test_checkpointing_keeps_a_hidden_state_a_layer_and_flash_attention_no_square() -> None:
    """Doubling the tokens doubles everything under flash-attention; sdpa's mask grows with their square."""
    structure = structure_of(shipped_config("Qwen2.5-7B"), Lora(16, 16.0, "all-linear", "float32"))

    def of(tokens: int, attention: str) -> Any:
        return activations_of(
            structure,
            lengths=(tokens,),
            dtype="bfloat16",
            gradient_checkpointing=True,
            lockstep=True,
            attention=attention,
            under_zero3=True,
        )

    one, two = of(4096, "flash_attention_2"), of(8192, "flash_attention_2")
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.001)
    assert two.layer_bytes == pytest.approx(2 * one.layer_bytes, rel=0.01)
    hidden_1TD = 4096 * 3584 * 2
    assert 28 * hidden_1TD <= one.saved_bytes <= 33 * hidden_1TD
    assert of(8192, "sdpa").layer_bytes > two.layer_bytes + 8192**2
    assert "flash_attn" not in sys.modules
