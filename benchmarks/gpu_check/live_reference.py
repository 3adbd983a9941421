"""All parameters trained beside a frozen copy of the base: one ZeRO-3 engine with weights on the GPU and on the host.

A CPU cannot tell the two places apart; there the stage only runs.
"""

from __future__ import annotations

import gc
from copy import deepcopy
from typing import Any

import torch
import transformers as hf

from gpu_check.engines import join_group_of_one, objective
from gpu_check.models import families, sequences
from gpu_check.report import Place, Report
from uft_ds.data.mixture import Step
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, with_shards_on_host
from uft_ds.known.cache import Known
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.model import UFTModel
from uft_ds.streams.recompute import enable_recompute
from uft_ds.training.evaluate import check_log_ratios_are_zero
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

STEPS = 3


def run(report: Report, place: Place) -> None:
    join_group_of_one()
    engine, model = beside_a_copy(families(toy=place.toy)["llama"], report, place)
    before = _of_copy(model)
    _check_places(report, place, model, "the start")
    step = Step(0, tuple(sequences(9, 30, 14) if place.toy else sequences(300, 900, 511)))
    tokens = max(len(row.token_ids_T) for row in step.sequences)
    largest = check_log_ratios_are_zero(engine, step, tokens_per_micro_batch=tokens, tolerance=float("inf"))
    report.fact("largest log-ratio before the first step, nats", largest)
    report.demand(largest == 0.0, f"before the first step a log-ratio is {largest:.3g} nats, expected exactly 0")
    model.leave_base()
    method = Method(engine, objective("mse"), Known.of_reference("separate"), tokens)
    for _ in range(STEPS):
        found = run_step(method, step, 1e-3)
    report.fact("loss of the last step", found.metrics["loss"])
    report.demand(found.metrics["grad_norm"] > 0, "no gradient reaches the policy")
    _check_places(report, place, model, f"{STEPS} steps")
    after = _of_copy(model)
    report.demand(all(map(torch.equal, before, after)), "a shard of the copy has changed in the steps")


def beside_a_copy(config: Any, report: Report, place: Place) -> tuple[Engine, UFTModel]:
    """A bfloat16 model of which all parameters are trained, and its copy, as if transformers had loaded both."""
    import deepspeed

    name = "zero3" if place.device.type == "cuda" else "zero3_cpu"
    filled = deepspeed_config(read_deepspeed_file(name), dtype=torch.bfloat16, max_grad_norm=1.0)
    policy, reference = (_random_base(config, place.device) for _ in range(2))
    policy.requires_grad_(True)
    enable_recompute(policy, True)
    deepspeed.zero.Init(module=policy, config_dict_or_path=filled)
    with_both = _allocated(place)
    deepspeed.zero.Init(module=reference, config_dict_or_path=with_shards_on_host(filled))
    gc.collect()
    freed, size = with_both - _allocated(place), sum(p.ds_numel * p.element_size() for p in reference.parameters())
    if place.device.type == "cuda":
        report.fact("GPU memory that the copy has left, of its size", freed / size)
        report.demand(freed > 0.95 * size, f"the copy has left only {freed} of its {size} bytes on the GPU")
    model = UFTModel(policy, reference=reference, reference_mode="separate")
    layer = decoder_layer_class(policy)
    return Engine(model, filled, layer_class=layer, weight_decay=0.0, collective_timeout_minutes=5.0), model


def _random_base(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        base = hf.AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="packed", dtype=torch.bfloat16)
    base.requires_grad_(False)
    return base.train()


def _of_copy(model: UFTModel) -> list[torch.Tensor]:
    assert model.reference is not None
    return [parameter.ds_tensor.clone() for parameter in model.reference.parameters()]  # type: ignore[attr-defined]


def _allocated(place: Place) -> int:
    return torch.cuda.memory_allocated() if place.device.type == "cuda" else 0


def _check_places(report: Report, place: Place, model: UFTModel, after: str) -> None:
    """The policy's shards are on the rank's device; the copy's in host memory, page-locked where there is a GPU."""
    for name, parameter in model.named_parameters():
        shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        is_copy = name.startswith("reference.")
        expected = "cpu" if is_copy else place.device.type
        report.demand(shard.device.type == expected, f"after {after}: {name} is on {shard.device}, not on {expected}")
        if is_copy and place.device.type == "cuda":
            report.demand(shard.is_pinned(), f"after {after}: {name} is not page-locked")
    report.fact(f"places of shards after {after}", "looked at")
