"""A reward model of every family that has a classifier is written as one that scores the same; what is lost is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from mixtures import MIXTURES, TARGETS, build_mixture
from recipes import MINIMAL
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import Architecture, build_tiny_model
from toy import toy_model
from transformers import AutoModelForSequenceClassification

from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export import reward_model
from uft_ds.export.agreement import sample_sequences
from uft_ds.export.convert import StoredAs
from uft_ds.export.low_rank import read_low_rank, read_with_head
from uft_ds.export.reward_model import convert_to_reward_model
from uft_ds.export.source import Convertible
from uft_ds.recipe.to_settings import load_settings
from uft_ds.streams.adapters import adapter_config_of, adapter_tensors
from uft_ds.streams.stream import REWARD

WITHOUT_CLASSIFIER = {"granite"}
CLASSIFIERS = [name for name in get_args(Architecture) if name not in WITHOUT_CLASSIFIER]


def reward_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """A model with drawn adapters and a drawn head, and its adapter as a checkpoint holds it."""
    model = toy_model(base, further=(REWARD,), reference_mode="separate", **options)
    folder.mkdir(parents=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(adapter_tensors(model.policy, trained), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes(adapter_config_of(model.policy, with_head=True))
    return model


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`convert_to_reward_model` of an adapter's folder, as if it were a run's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL)
    settings = load_settings(str(recipe), ("objective.reward=head", "objective.loss=bradley_terry"))

    def converted(base: Path, adapter: Path, **options: Any) -> Path:
        @contextmanager
        def opened(path: Path, *_: Any, **__: Any) -> Iterator[Convertible]:
            yield Convertible(path, adapter, str(base), None, None, settings)

        monkeypatch.setattr(reward_model, "opened", opened)
        return convert_to_reward_model(adapter, tmp_path / "out", say=lambda text: None, **options).folder

    return converted


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", long_but(("qwen2", "gpt_neox"), CLASSIFIERS))
def test_every_family_scores_the_same(convert: Any, tmp_path: Path, architecture: Architecture, tied: bool) -> None:
    """Loaded by transformers, one text at a time, against our own packed row: to 1e-5 of the largest."""
    base = build_tiny_model(tmp_path / "base", architecture, tied=tied)
    check_scores(convert, base, reward_adapter(base, tmp_path / "adapter"), tmp_path / "adapter")


@pytest.mark.parametrize("family", long_but(("qwen3_moe",), [name for name in MIXTURES if name != "olmoe"]))
def test_every_mixture_scores_the_same(convert: Any, tmp_path: Path, family: str) -> None:
    """Adapters on the attention; the experts are written as the base's files hold them. OLMoE has no classifier."""
    base = build_mixture(tmp_path / "base", family)
    check_scores(convert, base, reward_adapter(base, tmp_path / "adapter", targets=TARGETS), tmp_path / "adapter")


def check_scores(convert: Any, base: Path, model: Any, adapter: Path) -> None:
    out = convert(base, adapter)
    sequences = sample_sequences(load_tokenizer(str(base)))
    with torch.no_grad():
        own_R = model(micro_batch(sequences), [REWARD])["reward"].values_R
        loaded = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
        found = [loaded(torch.from_numpy(s.token_ids_T.astype("int64"))[None]).logits[0, 0] for s in sequences]
    assert own_R.std() > 0.01, "the rewards should differ"
    torch.testing.assert_close(torch.stack(found), own_R, rtol=0, atol=1e-5 * max(1.0, float(own_R.abs().max())))
    names = load_file(out / "model.safetensors")
    assert "score.weight" in names
    assert not [name for name in names if "lm_head" in name or "embed_out" in name]


def test_a_change_that_bfloat16_cannot_hold_is_refused(convert: Any, tmp_path: Path) -> None:
    """As of any merge; float32 keeps it."""
    base = build_tiny_model(tmp_path / "base", "qwen2")
    reward_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    small = {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    small["base_model.model.score.weight"] = small["base_model.model.score.weight"] * 100  # above what rounding hides
    save_file(small, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckFailed, match=r"of the adapter's changes of rewards kept on .* convert with --dtype float32"
    ):
        convert(base, tmp_path / "adapter", stored=StoredAs("bfloat16"))
    assert not (tmp_path / "out").exists()
    assert convert(base, tmp_path / "adapter", stored=StoredAs("float32")).exists()


def test_an_adapter_without_a_head_is_no_reward_model(tmp_path: Path) -> None:
    """Named by its tensor; and a head of two labels, or one that is not finite, is none either."""
    base = build_tiny_model(tmp_path / "base", "qwen2")
    reward_adapter(base, tmp_path / "adapter")
    deltas, head = read_with_head(tmp_path / "adapter")
    assert head.shape == (1, 64)
    assert len(deltas) == 2 * 7
    file, name = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.score.weight"
    whole = load_file(file)
    for wrong in (None, torch.zeros(2, 64), whole[name] * torch.nan):
        save_file({key: t for key, t in (whole | {name: wrong}).items() if t is not None}, file)
        with pytest.raises(UserError, match=f"{name}: .*; expected the finite head of a reward model"):
            read_with_head(tmp_path / "adapter")


def test_the_adapter_of_a_reward_model_is_no_policys(tmp_path: Path) -> None:
    """No run starts from it, and no ordinary merge takes it."""
    base = build_tiny_model(tmp_path / "base", "qwen2")
    reward_adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match="the adapter of a reward model, which has a head; convert the run"):
        read_low_rank(tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"start\.adapter: .*: the adapter of a reward model, .*; no run starts from one"
    ):
        toy_model(base, start_adapter=tmp_path / "adapter")
