"""Log-probs by Hugging Face's own forward, with one layer's weights in memory at a time.

This makes it possible to compare a merged 32B model with its adapter on a machine that could hold neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from uft_ds.architectures.facts import decoder_layers
from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.errors import UserError
from uft_ds.host.process import returning_freed_memory
from uft_ds.host.terminal import in_one_line
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.streams.adapter_files import PREFIX
from uft_ds.streams.classifier import empty_classifier
from uft_ds.streams.load import meta_model, model_of
from uft_ds.streams.stored_names import origins, read_parameter
from uft_ds.streams.stream import POLICY_ADAPTER
from uft_ds.streams.weight_files import WeightFiles

_ROWS = 128
"""Rows of logits whose float32 log-softmax is in memory at a time."""
_PEFT_INFIX = "base_layer."


def empty_model(config: Any) -> Any:
    """A model without weights (on the meta device); its buffers, such as rotary frequencies, are allocated."""
    with init_empty_weights(include_buffers=False):
        model = model_of(config)
    model.requires_grad_(False)
    return model.eval()


def with_adapter(model: Any, adapter: Path) -> PeftModel:
    """PEFT's model of a base, loaded or empty, with an adapter; the adapter's weights are on the CPU, in float32.

    Raises:
        UserError: PEFT cannot load the adapter, or it is of another model.
    """
    try:
        policy: PeftModel = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{adapter}: PEFT cannot load this adapter ({in_one_line(str(error), 300)})") from None
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        # PEFT puts the adapter where the base's weights are, and of an empty base that is nowhere: load it again.
        try:
            linear = policy.get_submodule(f"{name.removesuffix('.weight')}.{POLICY_ADAPTER}")
        except AttributeError:
            raise UserError(f"{adapter}: {name}: the base has no such layer; it is of another model") from None
        linear.weight = nn.Parameter(tensor.float(), requires_grad=False)
    return policy.eval()


@torch.no_grad()
def streamed_logps(
    model: Any,
    weights: WeightFiles,
    sequences: tuple[Sequence, ...],
    *,
    adapters: bool = True,
    on_unit: Callable[[], None] = lambda: None,
) -> Tensor:
    """log pi(y|x), computed in float32: [responses], nats, float64.

    Args:
        model: an empty model, with or without an adapter; it is empty again afterwards.
        on_unit: called after each of the model's `num_units` parts.
    Raises:
        UserError: the files lack a weight.
    """
    batch = micro_batch(sequences)
    with (
        returning_freed_memory(),
        _streaming(model, weights, on_unit),
        nullcontext() if adapters else model.disable_adapter(),
    ):
        logits_NV = model(
            input_ids=batch.token_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            logits_to_keep=batch.predictors_N,
        ).logits[0]
    token_logps_N = torch.cat(
        [
            rows_CV.float().log_softmax(dim=-1).gather(1, targets_C[:, None]).squeeze(1)
            for rows_CV, targets_C in zip(logits_NV.split(_ROWS), batch.targets_N.split(_ROWS), strict=True)
        ]
    )
    return response_logps(token_logps_N, batch.response_of_N, len(batch.responses))


@torch.no_grad()
def streamed_values(
    model: Any,
    weights: WeightFiles,
    sequences: tuple[Sequence, ...],
    head_1D: Tensor,
    *,
    adapters: bool = True,
    on_unit: Callable[[], None] = lambda: None,
) -> Tensor:
    """The head's value at each response's last token, in float32: [responses], float64.

    For the arguments and errors see `streamed_logps`.
    """
    batch = micro_batch(sequences)
    with (
        returning_freed_memory(),
        _streaming(model, weights, on_unit),
        nullcontext() if adapters else model.disable_adapter(),
    ):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden_TD = base.get_decoder()(
            input_ids=batch.token_ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False
        ).last_hidden_state[0]
    return (hidden_TD[batch.last_R].float() @ head_1D[0].float()).double()


@torch.no_grad()
def streamed_scores(
    classifier: Any, weights: WeightFiles, sequences: tuple[Sequence, ...], *, on_unit: Callable[[], None]
) -> Tensor:
    """What Hugging Face's sequence classifier says of each response, in float32: [responses], float64.

    Each text that ends with a response is a row of one padded batch, and the classifier finds its last token by itself.

    Args:
        classifier: empty, with its padding token in the config.
    Raises:
        UserError: the files lack a weight.
    """
    texts = [s.token_ids_T[: response.end] for s in sequences for response in s.responses]
    lengths = torch.tensor([len(text) for text in texts])
    places_T = torch.arange(int(lengths.max()))
    token_ids_RT = torch.full((len(texts), len(places_T)), classifier.config.get_text_config().pad_token_id)
    for row, text in zip(token_ids_RT, texts, strict=True):
        row[: len(text)] = torch.from_numpy(text.astype("int64"))
    is_text_RT = (places_T < lengths[:, None]).long()
    with returning_freed_memory(), _streaming(classifier, weights, on_unit, plain=empty_classifier(classifier.config)):
        logits_R1 = classifier(input_ids=token_ids_RT, attention_mask=is_text_RT, use_cache=False).logits
    return logits_R1[:, 0].double()


def num_units(model: Any) -> int:
    """The number of parts of a model that are loaded one after the other."""
    return len(_units(model))


@contextmanager
def _streaming(model: Any, weights: WeightFiles, on_unit: Callable[[], None], plain: Any = None) -> Iterator[None]:
    """Within the block, forward hooks load each unit's weights before it runs and drop them afterwards.

    plain: the same model without adapters, on the meta device; None: the causal model of its config.
    """
    read = _reader(meta_model(model.config) if plain is None else plain, weights)
    handles = []
    for prefix, unit in _units(model):
        place = _Weights(read, prefix)
        handles.append(unit.register_forward_pre_hook(place.fill))
        handles.append(unit.register_forward_hook(place.empty))
        handles.append(unit.register_forward_hook(lambda *_: on_unit()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for prefix, unit in _units(model):
            _Weights(read, prefix).empty(unit)


def _units(model: Any) -> list[tuple[str, nn.Module]]:
    """(prefix of its weights' names, module) of each decoder layer and each other module with weights of its own."""
    named = dict(model.named_modules())
    of_decoder = decoder_layers(model.get_decoder())
    lists = {name for name, module in named.items() if module is of_decoder}
    units = []
    for name, module in named.items():
        is_layer = name.rpartition(".")[0] in lists
        is_inside = any(name.startswith(f"{layers}.") for layers in lists)
        has_weights = any(True for _ in module.parameters(recurse=False))
        if ".lora_" in name:  # adapters stay in memory, also those of a linear outside the layers
            continue
        if is_layer or (has_weights and not is_inside):
            units.append((f"{name}.", module))
    return units


def _reader(plain: Any, weights: WeightFiles) -> Callable[[str], Tensor]:
    """A function that reads a base weight by its name in memory, whatever the files call it.

    plain: the model without adapters, which change its names.
    """
    tied: dict[str, str] = getattr(plain, "all_tied_weights_keys", None) or {}
    found = origins(plain, {name: info.empty() for name, info in weights.infos.items()})

    def read(name: str) -> Tensor:
        stored = name if name in found else tied.get(name, name)
        if stored not in found:
            raise UserError(f"{weights.folder}: holds no {name}, which its config.json asks for")
        return read_parameter(stored, found[stored], weights.read, plain)

    return read


class _Weights:
    """Loads and drops the base weights of one unit; used as its forward hooks."""

    def __init__(self, read: Callable[[str], Tensor], prefix: str) -> None:
        self._read, self._prefix = read, prefix

    def fill(self, unit: nn.Module, *_inputs: Any) -> None:
        for name, owner, attribute in list(_empty_parameters(unit)):
            own = (self._prefix + name).removeprefix(PREFIX).replace(_PEFT_INFIX, "")
            tensor = self._read(own).float()
            setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))

    def empty(self, unit: nn.Module, *_inputs_and_output: Any) -> None:
        for name, parameter in list(unit.named_parameters()):
            if not parameter.is_meta and "lora_" not in name:
                owner_name, _, attribute = name.rpartition(".")
                empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                setattr(unit.get_submodule(owner_name), attribute, empty)


def _empty_parameters(unit: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name in the unit, owning module, attribute) of each parameter that must be read."""
    for name, parameter in unit.named_parameters():
        if parameter.is_meta:
            owner_name, _, attribute = name.rpartition(".")
            yield name, unit.get_submodule(owner_name), attribute
