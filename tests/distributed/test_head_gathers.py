"""The head under ZeRO-3: how often its weight is gathered, and that it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from tiny import build_tiny_model
from toy import forwarded, logps_through_logits, toy_model, toy_step

from uft_ds.data.micro_batch import micro_batch


def gathers_of_the_head(folder: Path, trains_head: bool) -> list[int]:
    """Calls that fetch the head's weight in the third step: in its forward, and by the end of its backward."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetched: list[Any] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        fetched.append(module)
        return fetch(self, module, *args, **kwargs)

    PartitionedParameterCoordinator.fetch_sub_module = counted
    engine = engine_of(folder, trains_head=trains_head)
    head = engine.module.policy.get_base_model().get_output_embeddings()
    sequences = toy_step().sequences
    counts: list[int] = []
    for _ in range(3):
        fetched.clear()
        batch = micro_batch(sequences[engine.rank :: engine.world_size])
        logps_R = forwarded(engine, batch, with_reference=not trains_head)["policy"]
        counts = [sum(module is head for module in fetched)]
        engine.backward(logps_R.sum(), is_last=True)
        counts.append(sum(module is head for module in fetched))
        engine.step(1e-3)
    return counts


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_gather_serves_policy_reference_and_backward(tmp_path: Path, tied: bool) -> None:
    """A frozen head is fetched once a micro-batch; a trained one once more, because its logits are computed again."""
    build_tiny_model(tmp_path, tied=tied)
    assert run_on_ranks(gathers_of_the_head, 2, tmp_path, False) == [[1, 1]] * 2
    assert run_on_ranks(gathers_of_the_head, 2, tmp_path, True) == [[1, 2]] * 2


def head_gradient(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(folder, trains_head=True)
    sequences = toy_step().sequences
    batch = micro_batch(sequences[engine.rank :: engine.world_size])
    logps_R = forwarded(engine, batch, with_reference=False)["policy"]
    engine.backward(logps_R.sum(), is_last=True)
    return {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("tied", "ranks"),
    [pytest.param(False, 2, marks=pytest.mark.long), (True, 3)],
    ids=["untied", "tied, uneven shards"],
)
def test_a_trainable_head_is_sharded(tmp_path: Path, tied: bool, ranks: int) -> None:
    """Gradients of head, embedding and adapters on 2 and 3 ranks (16576 weights: padded shards) equal one process's, by
    Hugging Face's own logits."""
    build_tiny_model(tmp_path, "llama", tied=tied)
    model = toy_model(tmp_path, trains_head=True)
    for sequence in toy_step().sequences:
        logps_through_logits(model, micro_batch([sequence])).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for grads in run_on_ranks(head_gradient, ranks, tmp_path):
        assert set(grads) == set(expected)
        for name, grad in expected.items():
            assert grad is not None
            assert float((grads[name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()), name
