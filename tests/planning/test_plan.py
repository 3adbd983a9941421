"""Plans of whole recipes: those that ship, a model that is known, and what is refused."""

from pathlib import Path

import pytest
from plans import cluster, plan, tiny_folder
from suites import long_but
from tiny import build_tiny_model, rope_of

from uft_ds.errors import UserError
from uft_ds.planning.plan import make_plan
from uft_ds.recipe.file import shipped_recipes
from uft_ds.recipe.to_settings import load_settings


def test_the_32b_recipe_fits_eight_gpus_of_80_gb() -> None:
    """With the file that it has, and with room; LoRA runs of this model on 8 x 80 GB are published."""
    found = plan()
    assert found.outcome.fits
    assert found.best_file is not None
    assert found.best_file.outcome.setting.deepspeed == "zero3"
    assert 20e9 < found.outcome.gpu_spare_bytes < 60e9
    assert found.remedies == ()
    assert found.combination is None


def test_bad_input_is_answered() -> None:
    """A GPU that is not known, and lengths that the recipe does not allow."""
    with pytest.raises(UserError, match=r"--gpu: .*h1000.*h100"):
        cluster(gpu="h1000")
    with pytest.raises(UserError, match=r"--tokens-per-response: 4096 given, at most data\.max_length 2048"):
        make_plan(load_settings("uft_qwen32b"), cluster(), tokens_per_response=4096)
    with pytest.raises(UserError, match=r"model\.base: 'no/such'"):
        make_plan(load_settings("uft_qwen32b", ("model.base=no/such",)), cluster())


@pytest.mark.parametrize("kind", long_but(["longrope"], ["dynamic", "longrope"]))
def test_lengths_past_the_models_positions_are_refused(tmp_path: Path, kind: str) -> None:
    """As `uft train` refuses them; up to the limit there is a plan."""
    base = build_tiny_model(tmp_path, "llama", rope_parameters=rope_of(kind, 512))
    with pytest.raises(UserError, match=rf"^data\.max_length: 1024 is past the 512 positions of this model, .*{kind}"):
        plan(f"model.base={base}", "data.max_length=1024", gpus=2)
    assert plan(f"model.base={base}", "data.max_length=512", gpus=2).outcome.fits


ONE_OF_EACH = ("reward_mistral7b", "uft_online_qwen32b", "uft_full_7b")


@pytest.mark.parametrize("name", long_but(ONE_OF_EACH, shipped_recipes()))
def test_every_shipped_recipe_is_planned(name: str) -> None:
    """On a model of some kilobytes, with the recipe's own objective, reference and DeepSpeed file."""
    room = ["generator.max_new_tokens=16"] if load_settings(name).is_online else []
    found = plan(f"model.base={tiny_folder()}", "data.max_length=64", *room, gpus=2, name=name)
    assert found.outcome.fits
    assert found.best_file is not None


@pytest.mark.parametrize(
    "name", long_but(["uft_mistral7b"], ["uft_mistral7b", "sft_mistral7b", "una_mistral7b", "reward_mistral7b"])
)
def test_other_recipes_are_planned(name: str) -> None:
    """7B on one GPU of 80 GB, with a reference and without."""
    found = plan(name=name, gpus=1)
    assert found.structure.num_base == 7_241_732_096
    assert found.outcome.fits


def test_a_reward_model_is_planned_without_logits() -> None:
    """A head of as many numbers as the hidden size beside the adapters, no reference, and no tile of logits."""
    reward, sft = plan(name="reward_mistral7b", gpus=8), plan(name="sft_mistral7b", gpus=8)
    assert reward.structure.num_lora - sft.structure.num_lora == 4096
    (found,), (other,) = reward.outcome.by_mode.values(), sft.outcome.by_mode.values()
    assert found.flops.head == found.flops.reference == 0 < other.flops.head
    assert reward.outcome.gpu.head_tile_bytes == 0 < sft.outcome.gpu.head_tile_bytes
    tight = plan("model.gradient_checkpointing=false", name="reward_mistral7b", gpus=1)
    assert not tight.outcome.fits
    assert tight.remedies
    assert not [change for option in tight.options for change in option.changes if "logits" in change]
