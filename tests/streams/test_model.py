"""Both streams over one set of weights, against Hugging Face's own forward of every sequence alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from toy import (
    UFT,
    logps_by_name,
    logps_through_logits,
    objective,
    streams_of,
    token_logps,
    toy_base,
    toy_model_again,
    toy_policy,
    toy_sequences,
)
from transformers import AutoModelForCausalLM, Gemma2Config, GPTJConfig, Qwen2Config

from uft_ds.architectures.facts import family_of
from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.errors import UserError
from uft_ds.objectives.objective import Objective, count_terms, micro_batch_loss
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.heads import LogpHead
from uft_ds.streams.load import attention_implementation, decoder_layer_class, load_base
from uft_ds.streams.model import UFTModel

QWEN2 = Qwen2Config()


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the adapters, by a name without the prefixes of wrappers and of PEFT's adapter name."""
    return {
        name.removeprefix("policy.").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }


def plain_policy(folder: Path, ours: UFTModel, dtype: torch.dtype) -> PeftModel:
    """The same base and adapters in `dtype`, from Hugging Face and PEFT alone: none of our modules inside."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    policy: Any = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    set_peft_model_state_dict(policy, get_peft_model_state_dict(ours.policy))
    return policy.to(dtype).eval()  # type: ignore[no-any-return]


def alone(policy: Any, sequence: Sequence) -> Tensor:
    """The definition: one sequence, Hugging Face's own forward, log_softmax over all logits; [supervised tokens]."""
    token_ids_T = torch.from_numpy(sequence.token_ids_T).long()
    logits_TV = policy(input_ids=token_ids_T[None], use_cache=False).logits[0]
    logps_TV = logits_TV.log_softmax(dim=-1)
    spans = [(r.start, r.end) for r in sequence.responses]
    return torch.cat([logps_TV[a - 1 : b - 1].gather(1, token_ids_T[a:b, None])[:, 0] for a, b in spans])


def loss_and_gradients(
    model: UFTModel, sequences: Seq[Sequence], uft: Objective, groups: Seq[Seq[int]] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """One step over `sequences`, packed into micro-batches by `groups` (all in one)."""
    model.zero_grad()
    terms = count_terms(uft, [response for sequence in sequences for response in sequence.responses])
    total = 0.0
    for group in groups or [range(len(sequences))]:
        batch = micro_batch([sequences[i] for i in group])
        loss, _ = micro_batch_loss(uft, batch, terms, logps_by_name(model, batch))
        loss.backward()
        total += loss.item()
    return total, adapter_gradients(model)


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Every tensor within `relative` of its own largest entry."""
    assert set(found) == set(expected)
    assert found
    for name, gradient in expected.items():
        difference = (found[name].double() - gradient.double()).abs().max()
        assert difference <= relative * gradient.abs().max(), (name, float(difference / gradient.abs().max()))
        assert gradient.any(), f"{name}: a zero gradient proves nothing"


# ---- packing


@pytest.mark.parametrize(
    ("gradient_checkpointing", "attention"),
    [(True, None), (False, "eager")],
    ids=["checkpointed", "plain-eager"],
)
def test_packed_sequences_never_attend_to_each_other(
    folder: Path, gradient_checkpointing: bool, attention: str | None
) -> None:
    """Packed log-probs of both streams equal Hugging Face's of each sequence alone, to 1e-5 nats.

    And where the tokens of one sequence change, its neighbours' log-probs stay (1e-6: the same shapes, so at most
    rounding), while its own do not.
    """
    model = toy_model_again(folder, gradient_checkpointing=gradient_checkpointing, attention=attention)
    sequences = toy_sequences(4)
    packed_N, packed_reference_N = token_logps(model, micro_batch(sequences))
    policy = plain_policy(folder, model, torch.float32)
    with torch.no_grad():
        alone_N = torch.cat([alone(policy, sequence) for sequence in sequences])
        with policy.disable_adapter():
            reference_alone_N = torch.cat([alone(policy, sequence) for sequence in sequences])
    torch.testing.assert_close(packed_N.detach(), alone_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_reference_N, reference_alone_N, rtol=0, atol=1e-5)

    changed = 1
    mutant = Sequence((sequences[changed].token_ids_T + 17) % 250 + 3, sequences[changed].responses)
    mutant_N, mutant_reference_N = token_logps(
        model, micro_batch([*sequences[:changed], mutant, *sequences[changed + 1 :]])
    )
    sizes = [sum(response.num_tokens for response in sequence.responses) for sequence in sequences]
    for before_N, after_N in ((packed_N, mutant_N), (packed_reference_N, mutant_reference_N)):
        for i, (before, after) in enumerate(zip(before_N.split(sizes), after_N.split(sizes), strict=True)):
            if i == changed:
                assert (before - after).abs().max() > 0.1
            else:
                torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_order_in_the_micro_batch_does_not_matter(family_folder: Path) -> None:
    """Reversed neighbours: the same log-probs for every sequence, to 1e-5 nats."""
    model, sequences = toy_model_again(family_folder), toy_sequences(4)
    sizes = [sum(response.num_tokens for response in sequence.responses) for sequence in sequences]
    with torch.no_grad():
        forward = token_logps(model, micro_batch(sequences))[0].split(sizes)
        backward = token_logps(model, micro_batch(sequences[::-1]))[0].split(sizes[::-1])
    for one, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ---- invariants (docs/invariants.md)


@pytest.mark.parametrize(
    ("dtype", "lora_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_log_ratio_is_exactly_zero_before_the_first_step(
    family_folder: Path, dtype: torch.dtype, lora_dtype: torch.dtype
) -> None:
    """Invariant 1: with B = 0 every token's and every response's log-ratio is 0.0, not nearly; UFT's loss 0.25.

    For the toy's own scores the loss is the mean of (0.5 - score)^2.
    """
    model = toy_model_again(family_folder, dtype=dtype, lora_dtype=lora_dtype, b_std=0.0, gradient_checkpointing=True)
    batch = micro_batch(toy_sequences(5))
    logps_N, reference_logps_N = token_logps(model, batch)
    assert logps_N.dtype == reference_logps_N.dtype == torch.float32
    assert torch.equal(logps_N, reference_logps_N)
    logps = logps_by_name(model, batch)
    assert (logps["policy"] - logps["reference"]).tolist() == [0.0] * len(batch.responses)
    loss, _ = micro_batch_loss(UFT, batch, count_terms(UFT, batch.responses), logps)
    assert loss.item() == pytest.approx(float((0.5 - batch.scores_R).square().mean()), rel=1e-6)


def test_uft_loss_equals_float64_definition(folder: Path) -> None:
    """Invariant 6: packed, in float32, against the equations in float64 on one sequence at a time.

    Loss within 1e-6 relative, gradients within 1e-5 of each tensor's largest entry.
    """
    model, sequences = toy_model_again(folder), toy_sequences(5)
    policy = plain_policy(folder, model, torch.float64)
    policy_R, reference_R = definition_logps(policy, sequences)
    assert (policy_R - reference_R).abs().max() > 0.1, "log-ratios near zero would test nothing"
    scores_R = torch.tensor([r.score for sequence in sequences for r in sequence.responses], dtype=torch.float64)
    score_R = torch.sigmoid(0.1 * (policy_R - reference_R))
    definitions = {
        "mse": (score_R - scores_R) ** 2,
        "bce": -scores_R * torch.log(score_R) - (1 - scores_R) * torch.log(1 - score_R),
    }
    for loss, expected_R in definitions.items():
        found, gradients = loss_and_gradients(model, sequences, objective(loss, beta=0.1), groups=[[0, 3, 1], [4, 2]])
        policy.zero_grad()
        expected_R.mean().backward(retain_graph=True)
        assert found == pytest.approx(expected_R.mean().item(), rel=1e-6)
        assert_gradients_close(gradients, adapter_gradients(policy), 1e-5)


def definition_logps(policy: Any, sequences: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """log pi and log pi_ref of every response, one sequence at a time."""

    def sums() -> Tensor:
        return torch.stack(
            [
                logps.sum()
                for sequence in sequences
                for logps in alone(policy, sequence).split([r.num_tokens for r in sequence.responses])
            ]
        )

    policy_R = sums()
    with torch.no_grad(), policy.disable_adapter():
        return policy_R, sums()


def unfolded(sequence: Sequence) -> list[Sequence]:
    """One sequence for each response, which ends with it; earlier responses are context there."""
    return [Sequence(sequence.token_ids_T[: r.end], (r,)) for r in sequence.responses]


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_k_turn_conversation_equals_its_unfolded_examples(family_folder: Path, loss: str) -> None:
    """Invariant 5: three responses in one sequence give the loss and gradients of three sequences with one each."""
    rng = np.random.default_rng(5)
    spans = [(4, 9, 1.0), (13, 14, 0.2), (20, 33, 0.6)]
    responses = tuple(Response(a, b, score, "instruction", f"turn:{a}") for a, b, score in spans)
    conversation = Sequence(rng.integers(3, 259, size=33).astype(np.int32), responses)
    model, uft = toy_model_again(family_folder), objective(loss)
    merged_loss, merged = loss_and_gradients(model, [conversation], uft)
    merged = {name: gradient.clone() for name, gradient in merged.items()}
    unfolded_loss, expected = loss_and_gradients(model, unfolded(conversation), uft, groups=[[0, 2], [1]])
    assert merged_loss == pytest.approx(unfolded_loss, rel=1e-6)
    assert_gradients_close(merged, expected, 1e-5)


def test_checkpointing_and_attention_do_not_change_the_gradient(family_folder: Path) -> None:
    """Recomputed layers and eager attention give the gradients of the plain sdpa model, to 1e-5."""
    sequences = toy_sequences(3)
    loss, gradients = loss_and_gradients(toy_model_again(family_folder), sequences, UFT)
    for options in ({"gradient_checkpointing": True}, {"attention": "eager"}):
        other_loss, other = loss_and_gradients(toy_model_again(family_folder, **options), sequences, UFT)  # type: ignore[arg-type]
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert_gradients_close(other, gradients, 1e-5)


def test_own_path_equals_the_path_through_logits(family_folder: Path) -> None:
    """The check at the start compares these two: for a supported model they agree to 1e-5 nats."""
    model, batch = toy_model_again(family_folder), micro_batch(toy_sequences(3))
    with torch.no_grad():
        (own_N,) = token_logps(model, batch, "policy")
        theirs_N = logps_through_logits(model, batch)
    torch.testing.assert_close(own_N, theirs_N, rtol=0, atol=1e-5)


# ---- from here on one architecture is enough


def test_scaled_logits_are_seen_by_the_path_through_logits(tiny_qwen2: Path) -> None:
    """A model that caps its logits after the head differs there by more than a tenth of a nat."""
    model, batch = toy_model_again(tiny_qwen2), micro_batch(toy_sequences(3))
    model.policy.get_base_model().register_forward_hook(
        lambda module, inputs, output: output.__class__(logits=torch.tanh(output.logits))
    )
    with torch.no_grad():
        difference_N = token_logps(model, batch, "policy")[0] - logps_through_logits(model, batch)
    assert difference_N.abs().max() > 0.1


def test_the_policy_is_not_changed_by_leaving_the_reference_out(tiny_qwen2: Path) -> None:
    """Supervised fine-tuning runs one stream; its log-probs are bit for bit those with both."""
    model, batch = toy_model_again(tiny_qwen2), micro_batch(toy_sequences(3))
    both_N, reference_N = token_logps(model, batch)
    (only_N,) = token_logps(model, batch, "policy")
    assert torch.equal(both_N, only_N)
    assert not reference_N.requires_grad


def test_a_copy_of_the_base_stays_the_reference(family_folder: Path) -> None:
    """Equal to the policy bit for bit before the first step, with a graph; the same bits after the policy has moved,
    and what the model's own forward says. Without a copy the base is gone then."""
    policy, reference = (toy_base(family_folder) for _ in range(2))
    policy.requires_grad_(True)
    model = UFTModel(policy, reference=reference, reference_mode="separate")
    model.leave_base()
    batch, streams = micro_batch(toy_sequences(5)), list(model.streams.values())
    before = model(batch, streams, with_statistics=True)
    assert torch.equal(before["policy"].token_logps_N, before["reference"].token_logps_N)
    assert not before["reference"].token_logps_N.requires_grad
    before["policy"].token_logps_N.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None for parameter in reference.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * parameter.grad.sign())
    after = model(batch, streams, with_statistics=True)
    assert torch.equal(after["reference"].token_logps_N, before["reference"].token_logps_N)
    assert (after["policy"].token_logps_N - before["policy"].token_logps_N).abs().max() > 1e-3
    own = model(batch, [model.streams["reference"]], through_logits=True)["reference"].token_logps_N
    assert (own - after["reference"].token_logps_N).abs().max() < 1e-4
    alone = UFTModel(toy_base(family_folder).requires_grad_(True), reference_mode="separate")
    alone.leave_base()
    with pytest.raises(RuntimeError, match="its weights are trained, the values must come from a cache"):
        alone(batch, streams)


def test_a_copy_is_frozen_and_beside_a_trained_base_alone(tiny_qwen2: Path) -> None:
    with pytest.raises(ValueError, match="the reference of adapters is their own base"):
        UFTModel(toy_policy(tiny_qwen2), reference=toy_base(tiny_qwen2))
    policy = toy_base(tiny_qwen2).requires_grad_(True)
    with pytest.raises(ValueError, match=r"is frozen, but model\.embed_tokens\.weight is trained"):
        UFTModel(policy, reference=toy_base(tiny_qwen2).requires_grad_(True), reference_mode="separate")


def test_the_first_layer_sees_an_input_that_requires_grad(tiny_qwen2: Path) -> None:
    """The base is frozen, so nothing else would; ZeRO-3 would reduce a leaf layer's gradients before they exist."""
    model, seen = toy_model_again(tiny_qwen2), []
    first_layer = model.policy.get_base_model().get_decoder().layers[0]  # type: ignore[operator]
    first_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    model(micro_batch(toy_sequences(2)), streams_of(model, "policy"))
    assert seen == [True]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_an_empty_micro_batch_gives_every_adapter_a_zero_gradient(
    tiny_qwen2: Path, gradient_checkpointing: bool
) -> None:
    """A rank with nothing left walks the whole graph back: zeros, not None, or ZeRO would wait for ever."""
    model = toy_model_again(tiny_qwen2, gradient_checkpointing=gradient_checkpointing)
    batch = micro_batch([])
    loss, _ = micro_batch_loss(UFT, batch, {}, logps_by_name(model, batch))
    assert loss.item() == 0.0
    loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    assert all(p.grad is not None and not p.grad.any() for p in trainable)


def test_the_head_keeps_its_name_and_weight(tiny_qwen2: Path) -> None:
    """A class swap, not a wrapper: state dict names stay, and the head is still a Linear with the same weight."""
    base = load_base(
        str(tiny_qwen2), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False
    )
    policy = add_adapters(base, rank=4, alpha=8.0, targets="all-linear", dtype=torch.float32, seed=1)
    names, weight = list(policy.state_dict()), base.lm_head.weight
    model = UFTModel(policy)
    assert list(policy.state_dict()) == names
    assert [name.removeprefix("policy.") for name in model.state_dict()] == names
    assert isinstance(base.lm_head, LogpHead)
    assert isinstance(base.lm_head, nn.Linear)
    assert base.lm_head.weight is weight


def with_head(tiny_qwen2: Path, head: nn.Module) -> PeftModel:
    """A policy whose base has another head."""
    base = load_base(
        str(tiny_qwen2), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False
    )
    policy = add_adapters(base, rank=4, alpha=8.0, targets="all-linear", dtype=torch.float32, seed=1)
    base.lm_head = head
    return policy


def test_another_type_of_head_is_refused(tiny_qwen2: Path) -> None:
    """What a subclass does in its forward would be lost: the message names model and type."""

    class ScaledHead(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) / 2

    with pytest.raises(UserError, match=r"model\.base: Qwen2ForCausalLM has a head of type ScaledHead, not Linear"):
        UFTModel(with_head(tiny_qwen2, ScaledHead(64, 259, bias=False)))


def test_a_head_with_a_bias_is_supported(tiny_qwen2: Path) -> None:
    """The bias enters the log-probs: both paths agree, and differ from those without it."""
    torch.manual_seed(0)
    head = nn.Linear(64, 259).requires_grad_(False)
    model, batch = UFTModel(with_head(tiny_qwen2, head)), micro_batch(toy_sequences(2))
    with torch.no_grad():
        own_N = token_logps(model, batch, "policy")[0]
        torch.testing.assert_close(own_N, logps_through_logits(model, batch), rtol=0, atol=1e-5)
        head.bias.zero_()
        assert not torch.allclose(own_N, token_logps(model, batch, "policy")[0])


# ---- adapters and loading


def test_the_base_is_unchanged_by_a_step(family_folder: Path) -> None:
    """A large SGD step over all parameters moves every A and B, and no bit of the base."""
    model, sequences = toy_model_again(family_folder), toy_sequences(3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss, _ = loss_and_gradients(model, sequences, UFT)
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    assert loss_and_gradients(model, sequences, UFT)[0] != loss


def test_a_step_lowers_the_loss(family_folder: Path) -> None:
    """Gradients point the right way: a small step along them lowers the loss by about lr x their square.

    2% for the curvature at this step.
    """
    model, sequences = toy_model_again(family_folder), toy_sequences(3)
    before, gradients = loss_and_gradients(model, sequences, UFT)
    squared = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    rate = 1e-3 * before / squared
    torch.optim.SGD(model.parameters(), lr=rate).step()
    after, _ = loss_and_gradients(model, sequences, UFT)
    assert before - after == pytest.approx(rate * squared, rel=0.02)


def test_auto_attention_is_packed_where_the_tests_cover_it(tiny_qwen2: Path) -> None:
    """On every device and in every type; other names are taken as they are."""
    for config in (QWEN2, Gemma2Config()):
        for dtype in (torch.bfloat16, torch.float32):
            assert attention_implementation("auto", dtype, config) == "packed"
    assert attention_implementation("eager", torch.bfloat16, QWEN2) == "eager"
    base = load_base(str(tiny_qwen2), revision=None, dtype=torch.float32, attention="auto", gradient_checkpointing=True)
    assert base.config._attn_implementation == "packed"
    assert base.is_gradient_checkpointing
    assert base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_auto_attention_of_other_families_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attention on a GPU, which has no float32, else sdpa, else eager; a name that there is not is refused."""
    unknown = Qwen2Config()
    unknown.model_type = "never_seen"
    assert attention_implementation("auto", torch.float32, GPTJConfig()) == "eager"
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: object())
        for has_gpu, dtype, expected in (
            (True, torch.bfloat16, "flash_attention_2"),
            (True, torch.float32, "sdpa"),
            (False, torch.bfloat16, "sdpa"),
        ):
            patched.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
            assert attention_implementation("auto", dtype, unknown) == expected
    with pytest.raises(UserError, match=r"model\.attention: there is no sdpa for Gemma2.*expected auto, eager, packed"):
        attention_implementation("sdpa", torch.float32, Gemma2Config())


def test_decoder_layers_are_found(folder: Path) -> None:
    """ZeRO-3 gathers whole layers: the class of the first is the class of all, also under adapters."""
    base: Any = toy_policy(folder).get_base_model()
    layer_class = decoder_layer_class(base)
    assert layer_class.__name__ == family_of(base.config).layer_class
    assert sum(type(module) is layer_class for module in base.modules()) == 2


def test_a_base_with_dropout_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Attention dropout is no layer of its own, and would be active in training: both streams would be noise."""
    shutil.copytree(tiny_qwen2, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(
        UserError, match=r"model\.base: .*self_attn\.attention_dropout has a dropout of 0\.1, expected 0"
    ):
        toy_policy(tmp_path / "base")


def test_a_missing_or_broken_base_is_a_user_error(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A folder without weights ends with the recipe's key and the folder, not with a traceback."""
    (tmp_path / "config.json").write_bytes((tiny_qwen2 / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.base: .*could not be loaded"):
        load_base(str(tmp_path), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)


def test_a_micro_batch_moves_whole(tiny_qwen2: Path) -> None:
    """On another device (`meta` here) every tensor has moved, and nothing else changed."""
    batch = micro_batch(toy_sequences(2))
    moved = batch.to("meta")
    tensors = [value for value in (*vars(moved).values(), *moved.facts.values()) if isinstance(value, Tensor)]
    assert len(tensors) == 8
    assert moved.facts.keys() == batch.facts.keys() == {"score"}
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.longest, moved.responses, moved.pairs) == (batch.longest, batch.responses, batch.pairs)
    assert isinstance(moved, MicroBatch)
