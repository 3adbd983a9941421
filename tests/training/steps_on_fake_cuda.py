"""Training's own `micro_step` on fake tensors of `cuda:0`, forward and backward.

Run by `test_fake_cuda.py`, in a process with its library. What is not the code of training:

* the Triton kernels are not launched; a stand-in checks what they are given. All around them runs
* DeepSpeed's engine; in its place the module is called and the backward started
* `torch.cuda.get_device_capability` and `torch.cuda.device_of`, which need a driver
* sdpa is its plain definition: torch has no fused kernel for `cuda:0` here
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from suites import long_but
from tiny import VOCAB_SIZE, build_tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from toy import objective, toy_model
from transformers.utils import import_utils

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.kernels import rows_triton
from uft_ds.known.cache import Known
from uft_ds.objectives.groups import groups_of
from uft_ds.objectives.objective import count_terms
from uft_ds.objectives.shifts import StepShift, compared_with
from uft_ds.streams.divided import SequenceGroup
from uft_ds.streams.packed_attention import PACKED
from uft_ds.streams.stream import Output, Stream
from uft_ds.training.forwarding import Forwarded, Method, rows_of
from uft_ds.training.step import micro_step

CUDA = torch.device("cuda:0")
LORA_RANK = 4
HOST_MAKERS = ("_on_device", "_indices", "values", "bounds_for_attention", "own_places")
"""Functions that make a tensor of numbers that the host knows, and send it to the device without waiting."""

CARDS = {"varlen": (9, 0), "packed": (7, 5)}
"""The attention that packed rows get on a GPU of this compute capability: all segments at once, or one by one."""

WAIT_FOR_A_VALUE = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc", "_unique2",
    "unique_dim", "unique_consecutive", "_assert_scalar",
)  # fmt: skip
"""Operators whose result the host reads, or whose shape depends on values: the host waits until they are there."""


def waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator on tensors of a GPU lets the host wait for it.

    Args:
        name: without namespace and overload.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if name == "_to_copy":
        target = torch.device(kwargs.get("device") or tensors[0].device)
        return _copy_waits(tensors[0].device, target, bool(kwargs.get("non_blocking")))
    if name == "copy_":
        return _copy_waits(args[1].device, args[0].device, bool((*args[2:], kwargs.get("non_blocking", False))[0]))
    if not any(tensor.is_cuda for tensor in tensors):
        return False
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAIT_FOR_A_VALUE


def _copy_waits(source: torch.device, target: torch.device, non_blocking: bool) -> bool:
    """A copy to the host waits in any case: its values are read. One to the device need not."""
    return source.type != target.type and (target.type == "cpu" or not non_blocking)


class Operator(NamedTuple):
    """An operator that was run; where: the innermost functions of the project around it, the innermost first."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    where: tuple[str, ...]


class Watching(TorchDispatchMode):
    """Keeps all operators that are run within it, forward and backward, and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        where = _where()
        if waits(name, args, kwargs):
            self.waiting.append(f"{name} in {' < '.join(where) or 'the backward'}")
        result = func(*args, **kwargs)
        inputs, outputs = tuple(tensors_of((args, kwargs))), tuple(tensors_of(result))
        self.operators.append(Operator(func.name(), inputs, outputs, where))
        return result


def _where() -> tuple[str, ...]:
    names: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(names) < 3:
        if "/uft_ds/" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return tuple(names)


class FakeEngine:
    """What a micro-step uses of `Engine`. It keeps what it has forwarded."""

    def __init__(self, model: Any) -> None:
        self.module, self.streams, self.device = model, model.streams, CUDA
        self.outputs: list[Output] = []
        self.losses: list[Tensor] = []

    def __call__(self, batch: MicroBatch, streams: Seq[Stream], *, with_statistics: bool = False) -> dict[str, Output]:
        outputs: dict[str, Output] = self.module(batch, streams, with_statistics=with_statistics)
        self.outputs += outputs.values()
        return outputs

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.losses.append(loss)
        (loss * 2.0).backward()


class FakeKernel:
    """In the place of a Triton kernel: checks its arguments, and launches nothing."""

    def __init__(self, names: Seq[str]) -> None:
        self.names, self.launches = names, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        given = dict(zip(self.names, args, strict=False))
        self.launches += 1
        for name, tensor in given.items():
            if isinstance(tensor, Tensor):
                assert tensor.device == CUDA, name
                # The kernels take a row's stride; the columns of a row, and all other values, must be adjacent.
                assert tensor.stride(-1) == 1, name
        (rows,) = grid
        assert given["products_ptr"].dtype == torch.float32
        assert given["products_ptr"].shape == given["out_ptr"].shape == (rows, given["width"])
        assert given["out_ptr"].dtype == torch.bfloat16
        assert given["targets_ptr"].dtype == torch.int64
        for name in ("highest_ptr", "others_ptr", "target_ptr", "weighted_ptr", "rescale_ptr", "scales_ptr"):
            if name in given:
                assert given[name].dtype == torch.float32, name
                assert given[name].shape == (rows,), name
        assert options["BLOCK"] & (options["BLOCK"] - 1) == 0, "a power of two"


@contextmanager
def without_driver(card: str) -> Iterator[FakeKernel]:
    """What would ask CUDA or launch a kernel is replaced; the GPU has the compute capability of the card."""
    stand_in = FakeKernel(rows_triton.absorb_kernel.arg_names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_triton, "absorb_kernel", stand_in)
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARDS[card])
        # transformers leaves out what reads values where it sees fake tensors: with real ones it would be done.
        patch.setattr(import_utils, "is_fake_tensor", lambda tensor: False)
        yield stand_in


@pytest.fixture(scope="module", autouse=True)
def two_ranks() -> Iterator[None]:
    """One of two ranks, whose collective calls send nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "qwen2", num_hidden_layers=2)


def on_fake_cuda(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors of `cuda:0` in the places of all parameters and buffers; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            on_host = mode.from_tensor(tensor.detach())
            with mode:
                moved = on_host.to(CUDA)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return made[id(tensor)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})


def fake_batch(batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    """A micro-batch that was made of real numbers on the host, without its values: still on the host."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    faked = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    return replace(batch, **faked, facts={name: mode.from_tensor(fact) for name, fact in batch.facts.items()})


def pairs(count: int) -> tuple[Sequence, ...]:
    """Pairs of answers to one prompt each, with scores; lengths uneven."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        prompt = rng.integers(3, VOCAB_SIZE, size=5 + 3 * number)
        for score in (0.9, 0.2):
            tokens = np.concatenate([prompt, rng.integers(3, VOCAB_SIZE, size=4 + number)]).astype(np.int32)
            span = Response(len(prompt), len(tokens), score, "pair", f"fake:{number}", pair_id=number)
            made.append(Sequence(tokens, (span,)))
    return tuple(made)


class Case(NamedTuple):
    """A way to train. how: the reference is obtained. center: of the objective. divided: rows over two ranks."""

    how: Any = "lockstep"
    loss: str = "mse"
    checkpointing: Any = True
    shared: bool = False
    card: str = "varlen"
    center: Any = "none"
    divided: bool = False


CASES = [
    *(Case(loss=loss) for loss in ("mse", "dpo")),
    Case("separate", "dpo"),
    Case("cached"),
    Case("none", "nll"),
    Case("none", "nll", card="packed"),
    *(Case(checkpointing=checkpointing, loss="dpo") for checkpointing in (False, "selective")),
    *(Case(checkpointing=checkpointing, card="packed") for checkpointing in (True, "selective")),
    Case(shared=True),
    Case(shared=True, card="packed", checkpointing="selective"),
    Case("cached", "dpo", shared=True),
    *(Case(how, shared=True, center="prompt") for how in ("lockstep", "cached")),
    *(Case(how, divided=True) for how in ("lockstep", "cached")),
]
FAST = (
    Case(),
    Case("none", "nll", card="packed"),
    Case(shared=True, card="packed", checkpointing="selective"),
    Case("cached", shared=True, center="prompt"),
)
"""Most values of each field, which are independent of each other."""


class Ran(NamedTuple):
    """What a micro-step has left."""

    case: Case
    watching: Watching
    engine: FakeEngine
    forwarded: Forwarded
    loss: Tensor
    hidden: list[Tensor]
    launches: int


@contextmanager
def prepared(case: Case, folder: Path) -> Iterator[tuple[Method, MicroBatch, Mapping[str, int]]]:
    """The method and the micro-batch of a case, on `cuda:0`, within the fake mode."""
    model = toy_model(
        folder,
        dtype=torch.bfloat16,
        gradient_checkpointing=case.checkpointing,
        attention=PACKED,
        reference_mode="separate" if case.how == "separate" else "lockstep",
    )
    if case.divided:
        model.divide_rows(SequenceGroup(torch.distributed.group.WORLD, 0, 2))
    mode = FakeTensorMode()
    on_fake_cuda(model, mode)
    sequences = pairs(2)
    batch = fake_batch(micro_batch(sequences, share_prompts=case.shared), mode)
    assert batch.shares_prompts == case.shared
    table = {key: -10.0 for sequence in sequences for key in sequence.response_keys}
    known = Known.of_reference(case.how, table if case.how == "cached" else None)
    engine: Any = FakeEngine(model)
    method = Method(engine, objective(case.loss, center=case.center), known, 1 << 10)
    with mode:
        yield method, batch.to(CUDA), count_terms(method.objective, Step(0, sequences).responses)


@pytest.fixture(scope="module", params=long_but(FAST, CASES), ids=lambda case: "-".join(map(str, case)))
def ran(request: pytest.FixtureRequest, folder: Path) -> Ran:
    """One micro-step, forward and backward."""
    case: Case = request.param
    hidden: list[Tensor] = []
    with without_driver(case.card) as kernel, prepared(case, folder) as (method, batch, terms):
        engine: Any = method.engine
        for layer in engine.module.policy.get_base_model().get_decoder().layers:
            layer.register_forward_hook(lambda module, args, result: hidden.extend(tensors_of(result)))
        groups = groups_of(method.objective, Step(0, pairs(2)))
        (compared,) = compared_with(method.objective, StepShift(groups=groups), [batch])
        assert (compared is not None) == (case.center != "none")
        on_device = None if compared is None else compared.to(CUDA)
        forwards_reference = case.how in ("lockstep", "separate")
        with Watching() as watching:
            loss, _, done = micro_step(method, batch, forwards_reference, terms, on_device, is_last=True)
    return Ran(case, watching, engine, done, loss, hidden, kernel.launches)


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def test_all_is_on_the_device_and_has_its_type(ran: Ran) -> None:
    """Every tensor is on `cuda:0`, but for numbers that the host knows and sends; hidden states and gradients have the
    types of the weights, log-probs and the loss are float32, and sums over tokens float64."""
    for operator in ran.watching.operators:
        on_host = [tensor for tensor in operator.outputs if tensor.device != CUDA]
        assert not on_host or set(operator.where) & set(HOST_MAKERS), (operator.name, operator.where, on_host)
        mixed = {tensor.device for tensor in operator.inputs} if "copy" not in operator.name else {CUDA}
        assert len(mixed) <= 1, (operator.name, operator.where)
    assert ran.hidden
    assert {tensor.dtype for tensor in ran.hidden} == {torch.bfloat16}
    for output in ran.engine.outputs:
        assert output.token_logps_N is not None
        assert output.entropy_N is not None
        assert output.token_logps_N.dtype == output.entropy_N.dtype == torch.float32
    assert [loss.dtype for loss in ran.engine.losses] == [torch.float32]
    assert ran.loss.dtype == torch.float32
    assert not ran.loss.requires_grad
    assert {column.dtype for column in ran.forwarded.logps.values()} == {torch.float64}
    assert ran.launches
    trained = {name: p for name, p in ran.engine.module.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.device == CUDA, name
        assert parameter.grad.dtype == parameter.dtype == torch.float32, name


def test_the_attention_is_that_of_the_card(ran: Ran) -> None:
    """All segments at once on a GPU since Ampere; the others run torch's attention for each of them."""
    names = [operator.name for operator in ran.watching.operators]
    varlen = [name for name in names if "_varlen_attn" in name]
    single = [name for name in names if "_softmax" in name]
    assert bool(varlen) == (ran.case.card == "varlen")
    assert bool(single) == (ran.case.card == "packed")


def test_wide_matrix_products_are_of_half_precision(ran: Ran) -> None:
    """Only products with an adapter's matrix, one side of which is the rank, are of float32: a product of wide ones
    takes a GPU ten times as long. None is of float64."""
    products = [op for op in ran.watching.operators if op.name.split("::")[1].split(".")[0] in ("mm", "addmm", "bmm")]
    assert products
    for operator in products:
        matrices = operator.inputs[-2:]
        types = {tensor.dtype for tensor in matrices}
        is_thin = any(LORA_RANK in tensor.shape for tensor in matrices)
        assert types == {torch.bfloat16} or (is_thin and types == {torch.float32}), (operator.name, operator.where)


def test_a_micro_step_never_waits_for_the_device(ran: Ran) -> None:
    """Neither forward nor backward reads a value, nor has a shape that depends on one."""
    assert ran.watching.waiting == []


@pytest.mark.parametrize("how", ["lockstep", "cached", "none"])
def test_the_end_of_a_step_reads_its_responses_in_one_transfer(how: Any, folder: Path) -> None:
    """However many micro-batches the step has."""
    loss = "nll" if how == "none" else "mse"
    with without_driver("varlen"), prepared(Case(how, loss), folder) as (method, batch, terms):
        done = [micro_step(method, batch, how == "lockstep", terms, None, is_last=False)[2] for _ in range(3)]
        # A fake tensor has no values to go on with.
        with Watching() as watching, pytest.raises(RuntimeError, match=r"numpy|fake|Fake"):
            rows_of(method.objective, done)
    assert [wait.split()[0] for wait in watching.waiting] == ["_to_copy"]


PLANTED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "cpu non_blocking": lambda x: x.to("cpu", non_blocking=True),
    "copy_": lambda x: torch.zeros(3).copy_(x),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "to": lambda x: torch.tensor([1.0]).to(x.device),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_seen(name: str) -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3)).to(CUDA)
        with Watching() as watching:
            try:
                PLANTED[name](x)
            except RuntimeError:
                assert watching.waiting, "the fake mode has no value to go on with: seen before"
    assert len(watching.waiting) == 1


def test_what_does_not_wait_is_not_seen() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3)).to(CUDA)
        index = mode.from_tensor(torch.tensor([0, 2])).to(CUDA)
        with Watching() as watching:
            torch.tensor([1.0]).to(CUDA, non_blocking=True)
            x[index] = x[index] * 2
            torch.where(x > 0, x, 0.0).sum()
    assert watching.waiting == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_wait_in_the_backward_is_seen(checkpointed: bool) -> None:
    """The backward of a GPU's tensors runs on another thread."""

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            grad.cpu()
            return grad * 2

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(3)).to(CUDA).requires_grad_()
        with Watching() as watching:
            y = checkpoint(Waits.apply, x, use_reentrant=False) if checkpointed else Waits.apply(x)
            assert watching.waiting == []
            y.sum().backward()
    assert len(watching.waiting) == 1
