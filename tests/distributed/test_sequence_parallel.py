"""Rows divided over ranks: gradients of one process, packed rows exact across the borders, activations divided."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, engine_of, single_process
from ranks import run_on_ranks
from runs import losses, recipe_in, uft
from tiny import build_tiny_model
from toy import forwarded, objective, toy_step
from wrappers import build_wrapper

from uft_ds.data.micro_batch import micro_batch
from uft_ds.engine.engine import Engine
from uft_ds.streams.divided import why_undivided

AS_ONE = 1e-6
"""How far gradients may be from one process's, relative to the largest element."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With four heads of keys, so that four ranks can share a row."""
    return build_tiny_model(tmp_path_factory.mktemp("divided") / "base", num_key_value_heads=4)


def borders_of(engine: Engine, row: Any) -> list[int]:
    """Places in a row where one rank's part ends."""
    size = engine.ranks.sequence_size
    own = -(-len(row.token_ids_T) // size)
    return [own * rank for rank in range(1, size)]


def crossing(engine: Engine, row: Any) -> int:
    """How many responses have supervised tokens on both sides of a border."""
    found = 0
    for place in borders_of(engine, row):
        before = set(row.response_of_N[row.predictors_N < place].tolist())
        found += len(before & set(row.response_of_N[row.predictors_N >= place].tolist()))
    return found


def divided_step(folder: Path, sequence_size: int, tokens: int, options: dict[str, Any]) -> Any:
    """Gradients, loss and norm of the toy step; how many responses a border crosses; bytes saved for a backward."""
    engine = engine_of(folder, attention="packed", sequence_size=sequence_size, **options)
    batches = engine.micro_batches(toy_step(), tokens)
    grads, loss = accumulate(engine, batches, objective("mse"))
    result = engine.step(1e-3)
    return grads, loss, result.grad_norm, sum(crossing(engine, batch) for batch in batches)


@pytest.mark.parametrize(
    ("ranks", "sequence_size", "options"),
    [
        pytest.param(2, 2, {}, marks=pytest.mark.long),
        (4, 2, {"gradient_checkpointing": True}),
        pytest.param(4, 4, {}, marks=pytest.mark.long),
        pytest.param(2, 2, {"reference_mode": "separate", "file": "zero2"}, marks=pytest.mark.long),
        pytest.param(2, 2, {"share_prompts": True, "gradient_checkpointing": "selective"}, marks=pytest.mark.long),
    ],
    ids=["2 share", "2 groups of 2", "4 share", "separate, zero2", "selective"],
)
def test_gradients_of_divided_rows_are_those_of_one_process(
    base: Path, ranks: int, sequence_size: int, options: dict[str, Any]
) -> None:
    """To 1e-6, with responses that cross a border between two ranks' parts."""
    expected, expected_loss, expected_norm = single_process(base, "mse")
    found = run_on_ranks(divided_step, ranks, base, sequence_size, 29, options)
    assert sum(crossed for *_, crossed in found) > 0
    for grads, loss, norm, _ in found:
        assert set(grads) == set(expected)
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= AS_ONE * grad.abs().max(), name
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


OTHERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "all parameters": (partial(build_tiny_model, tied=True), {"trains_all": True, "gradient_checkpointing": True}),
    "all parameters, selective": (build_tiny_model, {"trains_all": True, "gradient_checkpointing": "selective"}),
    "nf4": (build_tiny_model, {"quantization": "nf4", "gradient_checkpointing": "selective"}),
    "gemma3 with images": (partial(build_wrapper, name="gemma3"), {"gradient_checkpointing": "selective"}),
    "gemma3 with images, nf4": (partial(build_wrapper, name="gemma3"), {"quantization": "nf4"}),
    "qwen2_5_vl": (partial(build_wrapper, name="qwen2_5_vl"), {}),
    "mistral3": (partial(build_wrapper, name="mistral3"), {}),
}
"""How a model is built, and its options: what else a recipe may ask of a model whose rows it divides."""


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_other_models_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    """All parameters trained, tied or not, a base in NF4, and the language model inside of one that reads images."""
    build, options = OTHERS[name]
    folder = build(tmp_path)
    of_model = {key: value for key, value in options.items() if key != "gradient_checkpointing"}
    expected, expected_loss, expected_norm = single_process(folder, "mse", **of_model)
    for grads, loss, norm, crossed in run_on_ranks(divided_step, 2, folder, 2, 29, options):
        assert crossed > 0
        assert set(grads) == set(expected)
        for parameter, grad in expected.items():
            assert (grads[parameter] - grad).abs().max() <= AS_ONE * grad.abs().max(), parameter
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def saved_and_logps(folder: Path, sequence_size: int, num_sequences: int) -> tuple[int, torch.Tensor]:
    engine = engine_of(folder, attention="packed", sequence_size=sequence_size)
    batch = micro_batch([toy_step().sequences[3]] * num_sequences).to(engine.device)
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not hasattr(tensor, "ds_id"):  # a gathered weight
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = forwarded(engine, batch)
    engine.backward(logps["policy"].sum(), is_last=True)
    return sum(sizes.values()), logps["policy"].detach()


def test_saved_activations_are_divided(base: Path) -> None:
    """Half of them on each of two ranks, which hold the same log-probs; of a row 1.9 times as long no more."""
    (whole, logps_R), *_ = run_on_ranks(saved_and_logps, 2, base, 1, 10)
    divided = run_on_ranks(saved_and_logps, 2, base, 2, 10)
    longer = run_on_ranks(saved_and_logps, 2, base, 2, 19)
    assert torch.equal(divided[0][1], divided[1][1])
    assert (divided[0][1] - logps_R).abs().max() < 1e-4
    assert all(saved <= 0.55 * whole for saved, _ in divided)
    assert all(saved <= whole for saved, _ in longer)


@pytest.mark.long
def test_a_run_divides_its_rows(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Losses of a run that does not, to rounding; it goes on from its middle without dividing them, and the reverse."""
    alone, divided = recipe_in(tmp_path / "alone", tiny_qwen2), recipe_in(tmp_path / "divided", tiny_qwen2)
    both = {alone: ("launch.ranks=2",), divided: ("launch.ranks=2", "launch.sequence_parallel=2")}
    for recipe, options in both.items():
        result = uft("train", str(recipe), *options)
        assert result.returncode == 0, result.stdout + result.stderr
    expected = losses(alone.parent / "run")
    assert losses(divided.parent / "run") == pytest.approx(expected, rel=1e-4)
    for recipe, options in zip(both, reversed(both.values()), strict=True):
        folder = recipe.parent / "run"
        (folder / "DONE").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-000006")
        result = uft("train", str(recipe), "--resume", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "resuming from step-000004" in result.stdout
        assert losses(folder) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("launch.ranks=3", "launch.sequence_parallel=2"), "2 given, which does not divide the 3 ranks"),
        (("launch.ranks=4", "launch.sequence_parallel=4"), "cannot be divided over 4 ranks; give a number"),
        (
            ("launch.sequence_parallel=2", "model.attention=sdpa"),
            "tokens alone; take model.attention: packed where the model has it, or give 1",
        ),
        (("launch.sequence_parallel=2", "data.max_length=400"), "times launch.sequence_parallel 2 is less than"),
    ],
)
def test_a_recipe_that_cannot_divide_is_refused(
    tiny_qwen2: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """Before anything is launched."""
    recipe = recipe_in(tmp_path, tiny_qwen2)
    result = uft("train", str(recipe), *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_divided_is_said() -> None:
    """Heads that the number of ranks does not divide, with the numbers that do; and an attention that sees a rank's own
    tokens alone, for which no other number would do."""
    from transformers import Qwen2Config

    config = Qwen2Config(num_attention_heads=28, num_key_value_heads=4)
    assert why_undivided(config, "packed", 4) is None
    cannot = "28 heads with 4 of keys cannot be divided over 8 ranks"
    assert why_undivided(config, "packed", 8) == f"{cannot}; give a number that divides them (2, 4), or 1"
    odd = Qwen2Config(num_attention_heads=9, num_key_value_heads=1)
    assert why_undivided(odd, "packed", 2) == "9 heads with 1 of keys cannot be divided over 2 ranks; give 1"
    alone = "attention sdpa computes each rank's tokens alone"
    remedy = "take model.attention: packed where the model has it, or give 1"
    assert why_undivided(config, "sdpa", 2) == f"{alone}; {remedy}"
