"""Invariant 9: n streams in one visit of the weights are n separate forwards, bit for bit, at SFT's activations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lanes import live_hidden_states, saved_bytes, watching
from torch import Tensor
from toy import logps_by_name, streams_of, toy_model_again, toy_sequences

from uft_ds.data.micro_batch import micro_batch
from uft_ds.streams.adapters import as_stream
from uft_ds.streams.model import UFTModel
from uft_ds.streams.packed_attention import attention_of_transformers
from uft_ds.streams.stream import POLICY, Output, Stream, trained_first

BATCH = micro_batch(toy_sequences(4))
THIRD = Stream("third", "third")
FOURTH = Stream("fourth", "fourth")
REWARD = Stream("reward", "reward", head="scalar")
FROZEN = (THIRD, FOURTH, REWARD)
VALUE = Stream("value", "value", trained=True, head="scalar")
SECOND = Stream("second", "second", trained=True)
CHECKPOINTED = pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])


def outputs_of(model: UFTModel, *names: str) -> dict[str, Output]:
    return model(BATCH, streams_of(model, *names), with_statistics=True)


def assert_same_output(found: Output, expected: Output) -> None:
    """Bit for bit, field by field."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def gradients_of(model: UFTModel, *names: str) -> dict[str, Tensor]:
    """Of a sum over all trained streams' outputs, each weighted unevenly."""
    model.zero_grad()
    outputs = outputs_of(model, *names)
    total = torch.zeros(())
    for name, output in outputs.items():
        if model.streams[name].trained:
            numbers = output.token_logps_N if output.values_R is None else output.values_R
            total = total + (numbers * torch.linspace(-1, 1, len(numbers))).sum()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@CHECKPOINTED
def test_invariant_9_streams_in_one_visit_equal_separate_forwards(
    family_folder: Path, gradient_checkpointing: bool
) -> None:
    """Policy, bare base, a frozen adapter and a frozen scorer: log-probs, statistics and values of each are bit for
    bit those of a forward of its own, of Hugging Face's layers under `separate`, and for any number beside it."""
    options: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing, "further": FROZEN}
    model = toy_model_again(family_folder, **options)
    separate = toy_model_again(family_folder, reference_mode="separate", **options)
    names = ("policy", "reference", "third", "reward")
    together = outputs_of(model, *names)
    assert list(together) == list(names)
    for name in names:
        assert_same_output(together[name], outputs_of(model, name)[name])
        assert_same_output(together[name], outputs_of(separate, name)[name])
    assert_same_output(outputs_of(model, "third", "policy")["third"], together["third"])
    logps = [together[name].token_logps_N.detach() for name in names[:3]]
    assert all((logps[a] - logps[b]).abs().mean() > 0.01 for a, b in ((0, 1), (0, 2), (1, 2))), "streams must differ"
    assert [together[name].token_logps_N.requires_grad for name in names[:3]] == [True, False, False]
    assert not together["reward"].values_R.requires_grad


@CHECKPOINTED
def test_frozen_streams_change_no_bit_of_the_gradient(family_folder: Path, gradient_checkpointing: bool) -> None:
    """The policy's gradients beside three other streams are those of the policy alone; the others have none."""
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing, further=FROZEN)
    expected = gradients_of(model, "policy")
    found = gradients_of(model, "policy", "reference", "third", "reward")
    assert set(found) == set(expected)
    assert all(".default." in name for name in found)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize(
    ("gradient_checkpointing", "other"),
    [
        pytest.param(True, SECOND, id="checkpointed-tokens head"),
        pytest.param(False, VALUE, id="plain-scalar head"),
        pytest.param(True, VALUE, id="checkpointed-scalar head", marks=pytest.mark.long),
        pytest.param(False, SECOND, id="plain-tokens head", marks=pytest.mark.long),
    ],
)
def test_two_trained_streams_have_the_gradients_of_each_alone(
    family_folder: Path, gradient_checkpointing: bool, other: Stream
) -> None:
    """In one visit, recomputed in the backward under the right adapter, a reference beside them: bit for bit."""
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing, further=(other,))
    expected = gradients_of(model, "policy") | gradients_of(model, other.name)
    found = gradients_of(model, "policy", "reference", other.name)
    assert set(found) == set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.any() for grad in found.values())
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@CHECKPOINTED
def test_a_scalar_head_trains_as_a_plain_forward_and_a_linear_would(
    family_folder: Path, gradient_checkpointing: bool
) -> None:
    """Values at each response's last token and all gradients, against Hugging Face's model, PEFT's own switch and a
    linear layer on its hidden states, one sequence at a time; to 1e-5 of each tensor's largest entry."""
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing, further=(VALUE,))
    values_R = outputs_of(model, "policy", "value")["value"].values_R
    found = gradients_of(model, "policy", "value")
    plain: Any = toy_model_again(family_folder, further=(VALUE,)).policy  # no lanes: layers as they were
    plain.set_adapter("value")
    weight_1D = model.scores["value"].weight.detach().clone().requires_grad_()
    with attention_of_transformers(plain.get_base_model()):
        expected_R = torch.cat(
            [
                plain.get_base_model().get_decoder()(
                    input_ids=torch.from_numpy(sequence.token_ids_T.astype("int64"))[None], use_cache=False
                ).last_hidden_state[0, [response.end - 1 for response in sequence.responses]]
                @ weight_1D[0]
                for sequence in toy_sequences(4)
            ]
        )  # fmt: skip
    torch.testing.assert_close(values_R.detach(), expected_R.detach(), rtol=0, atol=1e-5)
    (expected_R * torch.linspace(-1, 1, len(expected_R))).sum().backward()
    expected = {f"policy.{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    expected["scores.value.weight"] = weight_1D.grad
    assert set(expected) == {name for name in found if ".default." not in name}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-5 * float(grad.abs().max()), msg=name)
    before = values_R.detach()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert (outputs_of(model, "value")["value"].values_R.detach() - before).abs().max() > 1e-4


def test_the_third_stream_is_its_adapter_on_the_base(tiny_qwen2: Path) -> None:
    """Bit for bit the policy of a model whose one adapter has the third's weights."""
    model = toy_model_again(tiny_qwen2, further=(THIRD,))
    alone = toy_model_again(tiny_qwen2)
    drawn = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if ".default." in name:
                parameter.copy_(drawn[name.replace(".default.", ".third.")])
    third = outputs_of(model, "policy", "reference", "third")["third"]
    assert torch.equal(third.token_logps_N, outputs_of(alone, "policy")["policy"].token_logps_N.detach())


@CHECKPOINTED
def test_frozen_streams_keep_nothing_for_the_backward(family_folder: Path, gradient_checkpointing: bool) -> None:
    """Four streams save as many bytes as the policy alone (SFT, ratio 1.00), and no tensor outlives its layer."""
    model = toy_model_again(family_folder, gradient_checkpointing=gradient_checkpointing, further=FROZEN)
    names = ("policy", "reference", "third", "fourth")
    assert saved_bytes(model, *names) == saved_bytes(model, "policy") > 0
    assert live_hidden_states(model, *names) == live_hidden_states(model, "policy")


def test_only_trained_streams_are_recomputed(tiny_qwen2: Path) -> None:
    """Five streams of which two are trained: each layer is called once, its projection 5 times and 2 in the backward,
    under the adapters of the two."""
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=True, further=(THIRD, VALUE, REWARD))
    layers: Any = model.policy.get_base_model().get_decoder().layers
    calls: list[tuple[str, str]] = []
    watched = {f"layer {i}": layer for i, layer in enumerate(layers)}
    watched |= {f"projection {i}": layer.self_attn.q_proj for i, layer in enumerate(layers)}

    def note(name: str, module: Any) -> None:
        off = getattr(module, "disable_adapters", False)
        calls.append((name, "" if "layer" in name else "base" if off else module.active_adapters[0]))

    with watching(watched, note):
        outputs = outputs_of(model, "policy", "reference", "third", "value", "reward")
        assert Counter(calls) == Counter(
            {(f"layer {i}", ""): 1 for i in range(len(layers))}
            | {
                (f"projection {i}", a): 1
                for i in range(len(layers))
                for a in ("base", "default", "third", "value", "reward")
            }
        )
        calls.clear()
        (outputs["policy"].token_logps_N.sum() + outputs["value"].values_R.sum()).backward()
    assert Counter(calls) == Counter(
        {(f"projection {i}", a): 1 for i in range(len(layers)) for a in ("default", "value")}
    )


def test_no_flag_flips_and_an_exception_leaves_the_policys_adapter(tiny_qwen2: Path) -> None:
    """`requires_grad` is the same in every stream's part of a visit; after an exception the next visit is the same."""
    model = toy_model_again(tiny_qwen2, further=(THIRD, VALUE))
    names, flags = ("policy", "reference", "third", "value"), {n: p.requires_grad for n, p in model.named_parameters()}
    down = model.policy.get_base_model().get_decoder().layers[1].mlp.down_proj
    expected = outputs_of(model, *names)
    seen: list[str] = []

    def look(_: str, module: Any) -> None:
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        seen.append(module.active_adapters[0])
        if len(seen) == 2:
            raise KeyError

    with watching({"down": down}, look):
        with pytest.raises(KeyError):
            outputs_of(model, *names)
        assert (down.disable_adapters, down.active_adapters) == (False, ["default"])
    for name, output in outputs_of(model, *names).items():
        assert_same_output(output, expected[name])


def test_an_empty_micro_batch_reaches_every_trained_parameter(tiny_qwen2: Path) -> None:
    """A rank with nothing left: no response, no value, and zeros for all gradients, or ZeRO would wait for ever."""
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=True, further=(VALUE,))
    outputs = model(micro_batch([]), streams_of(model, "policy", "value"))
    assert outputs["value"].values_R.shape == (0,)
    (outputs["policy"].token_logps_N.sum() * 0.0 + outputs["value"].values_R.sum() * 0.0).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_statistics_are_those_of_the_logits(tiny_qwen2: Path) -> None:
    """Entropy and top-1 of policy and reference, of Hugging Face's own logits; without gradient."""
    model = toy_model_again(tiny_qwen2)
    outputs, base = outputs_of(model), model.policy.get_base_model()
    for name, output in outputs.items():
        with torch.no_grad(), as_stream(model.policy, model.streams[name]), attention_of_transformers(base):
            logits_NV = model.policy(
                input_ids=BATCH.token_ids_T[None], position_ids=BATCH.position_ids_T[None], use_cache=False
            ).logits[0, BATCH.predictors_N]
        entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
        torch.testing.assert_close(output.entropy_N, entropy_N, rtol=0, atol=2e-5)
        assert torch.equal(output.is_top1_N, logits_NV.argmax(-1) == BATCH.targets_N)
        assert not output.entropy_N.requires_grad


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
def test_statistics_are_computed_where_they_are_asked_for(tiny_qwen2: Path, train_head: bool) -> None:
    """Only metrics read them: a forward without them gives the same bits of log-probs, and nothing else."""
    model = toy_model_again(tiny_qwen2)
    names = ("policy",) if train_head else ("policy", "reference")
    model.policy.get_base_model().get_output_embeddings().requires_grad_(train_head)
    plain = model(BATCH, streams_of(model, *names))
    for name, output in outputs_of(model, *names).items():
        assert output.entropy_N is not None
        assert output.is_top1_N is not None
        assert_same_output(plain[name], Output(output.token_logps_N))


# ---- refused


def test_streams_that_do_not_belong_together_are_refused(tiny_qwen2: Path) -> None:
    """Two of a name, one that the model does not have, one adapter for two trained streams, none at all."""
    model = toy_model_again(tiny_qwen2)
    with pytest.raises(ValueError, match="expected one or more with distinct names"):
        model(BATCH, (POLICY, POLICY))
    with pytest.raises(ValueError, match="expected one or more with distinct names"):
        model(BATCH, ())
    with pytest.raises(ValueError, match="is not of this model"):
        model(BATCH, (POLICY, Stream("reference", "default")))
    with pytest.raises(ValueError, match="two trained streams have one adapter"):
        trained_first((POLICY, Stream("value", "default", trained=True, head="scalar")))
    with pytest.raises(ValueError, match="the bare base is frozen"):
        UFTModel(model.policy, further=(Stream("value", None, trained=True),))


def test_an_adapter_that_is_not_what_its_stream_says_is_refused(tiny_qwen2: Path) -> None:
    """Missing; trained where the stream is frozen; a second trained one in separate forwards."""
    policy = toy_model_again(tiny_qwen2, further=(THIRD,)).policy
    with pytest.raises(ValueError, match="stream 'reward': there is no adapter 'reward'"):
        UFTModel(policy, further=(REWARD,))
    with pytest.raises(ValueError, match="stream 'value' is trained, which its adapter 'third' is not"):
        UFTModel(policy, further=(Stream("value", "third", trained=True),))
    with pytest.raises(ValueError, match="beside the policy, a stream is trained in lockstep only"):
        toy_model_again(tiny_qwen2, further=(VALUE,), reference_mode="separate")


def test_sums_of_streams_are_by_name(tiny_qwen2: Path) -> None:
    """Log-probs of responses of streams with a tokens head; of a scalar head the values themselves."""
    model = toy_model_again(tiny_qwen2, further=(THIRD, REWARD))
    logps = logps_by_name(model, BATCH, "reward", "third", "policy")
    assert set(logps) == {"reward", "third", "policy"}
    assert all(logps_R.shape == (BATCH.num_responses,) for logps_R in logps.values())
    assert logps["third"].dtype == logps["policy"].dtype == torch.float64
    assert torch.equal(logps["reward"], outputs_of(model, "reward")["reward"].values_R)
