"""Mixtures of experts: adapters on the attention, the router frozen, each layer gathered as a whole on all ranks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, engine_of, single_process
from mixtures import TARGETS, outputs_and_gradients
from plan_measured import counting
from ranks import run_on_ranks
from runs import losses, recipe_in, settings_of_run, uft
from toy import objective, toy_step
from transformers import AutoConfig, AutoModelForCausalLM

from uft_ds.engine.engine import Engine
from uft_ds.errors import UserError
from uft_ds.planning.structure import Lora, structure_of
from uft_ds.run.prepare import check_run
from uft_ds.streams.stream import logps_of


def routed(engine: Engine, batch: Any) -> list[int]:
    """How many of a rank's tokens each expert of the first layer gets in the policy's forward."""
    counts: list[int] = []

    def note(module: Any, given: Any, output: Any) -> None:
        chosen = next(tensor for tensor in output if tensor.dtype == torch.int64)
        counts.extend(torch.bincount(chosen.flatten(), minlength=4).tolist()[: 4 - len(counts)])

    base = engine.module.policy.get_base_model()
    router = next(m for name, m in base.named_modules() if type(m).__name__.endswith("Router"))
    handle = router.register_forward_hook(note)
    with engine.evaluating():
        engine(batch, [engine.streams["policy"]])
    handle.remove()
    return counts


def step_on_ranks(folder: Path, options: dict[str, Any]) -> Any:
    """Gradients, loss and norm of the toy step, how its tokens were routed here, and bytes gathered of both streams and
    of one."""
    engine = engine_of(folder, targets=TARGETS, **options)
    batches = engine.micro_batches(toy_step(), 64)
    counts = routed(engine, batches[0])
    grads, loss = accumulate(engine, batches, objective("mse"))
    norm = engine.step(1e-3).grad_norm
    gathered = []
    for names in (("policy", "reference"), ("policy",)):
        for _ in range(2):  # the first time records the order of modules
            with counting() as sent:
                outputs = engine(batches[0], [engine.streams[name] for name in names])
                engine.backward(logps_of(outputs, batches[0])["policy"].sum(), is_last=True)
        gathered.append(sent.gathered)
    return grads, loss, norm, counts, gathered


def check(folder: Path, ranks: int, options: dict[str, Any]) -> None:
    expected, expected_loss, expected_norm = single_process(folder, "mse", targets=TARGETS, reference_mode="separate")
    found = run_on_ranks(step_on_ranks, ranks, folder, options)
    assert len({tuple(counts) for *_, counts, _ in found}) == ranks, "the ranks' tokens should be routed differently"
    for grads, loss, norm, _, (both, one) in found:
        assert set(grads) == set(expected)
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert both == one > 0


def test_gradients_are_those_of_one_process(mixture: Path) -> None:
    """On two ZeRO-3 ranks with other routing, in lockstep: those of separate forwards in one process; bytes of SFT."""
    check(mixture, 2, {})


@pytest.mark.long
def test_four_ranks_route_differently(qwen3_moe: Path) -> None:
    """With layers recomputed in the backward, where each rank's experts get other tokens again."""
    check(qwen3_moe, 4, {"gradient_checkpointing": True})


@pytest.mark.long
def test_ranks_that_share_rows_route_their_own_tokens(qwen3_moe: Path) -> None:
    """Each has a part of every row, whose tokens alone it sends to experts; with what costs little recomputed."""
    check(qwen3_moe, 2, {"attention": "packed", "sequence_size": 2, "gradient_checkpointing": "selective"})


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_lockstep_of_a_mixture_equals_two_separate_forwards(mixture: Path, gradient_checkpointing: bool) -> None:
    """Invariant 6: bit for bit the same log-probs of both streams and the same gradients."""
    ours, own_grads = outputs_and_gradients(mixture, "lockstep", gradient_checkpointing=gradient_checkpointing)
    theirs, grads = outputs_and_gradients(mixture, "separate", gradient_checkpointing=gradient_checkpointing)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("policy", "reference"))
    assert (ours["policy"] - ours["reference"]).abs().mean() > 0.1, "adapters that change nothing prove nothing"
    assert all(torch.equal(own_grads[name], grad) for name, grad in grads.items())


def test_adapters_on_a_router_are_refused_by_name(mixture: Path, tmp_path: Path) -> None:
    """It is no linear layer here: routing stays the base's."""
    recipe = recipe_in(tmp_path, mixture, lora={"rank": 4, "alpha": 8.0, "targets": ["q_proj", "gate"]})
    result = uft("train", str(recipe))
    assert result.returncode == 2
    assert re.search(r"lora\.targets: 'gate' is a \w+Router, expected linear layers.*lora\.experts", result.stderr)


def test_all_parameters_of_a_mixture_are_refused(mixture: Path, tmp_path: Path) -> None:
    """Its files hold the experts one by one, which transformers puts together: the trained model could not be written
    back into them."""
    recipe = recipe_in(tmp_path, mixture, lora=None, objective__reward_shift="none")
    with pytest.raises(UserError, match=r"^lora: null given, but .* hold \S*experts\S* in other .*; train adapters$"):
        check_run(settings_of_run(recipe))


def test_a_plan_counts_what_a_token_passes(mixture: Path) -> None:
    """Of the routed experts the share that the config states."""
    config = AutoConfig.from_pretrained(mixture)
    structure = structure_of(config, Lora(4, 8.0, TARGETS, "float32"))
    model = AutoModelForCausalLM.from_pretrained(mixture)
    routed_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert structure.num_base == sum(p.numel() for p in model.parameters())
    passed = config.num_experts_per_tok / config.num_experts
    assert structure.num_base - structure.num_active == round((1 - passed) * routed_experts)


@pytest.mark.long
def test_a_run_of_a_mixture_is_converted(qwen3_moe: Path, tmp_path: Path) -> None:
    """From the recipe to a model and an adapter that Hugging Face loads; the router and the experts are the base's."""
    recipe = recipe_in(tmp_path, qwen3_moe, lora={"rank": 4, "alpha": 8.0, "targets": TARGETS})
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    for arguments in (("model",), ("adapter", "--to", "adapter")):
        result = uft("convert", str(tmp_path / "run"), str(tmp_path / arguments[0]), *arguments[1:])
        assert result.returncode == 0, result.stdout + result.stderr
    ours = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    theirs = dict(AutoModelForCausalLM.from_pretrained(qwen3_moe).named_parameters())
    changed = {name.split(".")[-2] for name, value in theirs.items() if not torch.equal(ours[name], value)}
    assert changed == set(TARGETS)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    assert not config.get("target_parameters")
