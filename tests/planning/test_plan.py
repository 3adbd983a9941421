"""Plans of whole recipes: those that ship, a model that is known, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import GPT2, LEAKS, PACKED
from plans import cluster, plan, tiny, tiny_folder
from suites import long_but
from tiny import rope_of

from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.planning.plan import make_plan
from uft_ds.recipe.file import shipped_recipes
from uft_ds.recipe.to_settings import load_settings
from uft_ds.run.checks import check_recipe, check_sharding


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


def llama(**changes: Any) -> Any:
    config = PACKED["llama"]
    for key, value in changes.items():
        setattr(config, key, value)
    return config


WHOLE = ("lora=null", "reference.cache=false")
OF_MIXTURE = "lora.targets=[q_proj,v_proj]"
HEAD = ("objective.reward=head", "objective.loss=bradley_terry", "objective.beta=0.01")
ASKED = (
    "generator.by=builtin", "generator.url=null", "data.max_length=64", "generator.max_new_tokens=16",
    "objective.loss=nll", "objective.center=none",
)  # fmt: skip
REFUSED = {
    "heads": (PACKED["qwen2"], ("launch.sequence_parallel=4",), "4 heads with 2 of keys cannot be divided over 4"),
    "attention of divided rows": (
        PACKED["qwen2"],
        ("launch.sequence_parallel=2", "model.attention=sdpa"),
        "launch.sequence_parallel: 2 given, but in this model attention sdpa computes each rank's tokens alone",
    ),
    "lockstep": (PACKED["gemma"], (), "reference.mode: lockstep has not been shown to work with GemmaForCausalLM"),
    "a whole mixture": (
        PACKED["qwen3_moe"],
        ("lora=null",),
        r"lora: null given, but the files of Qwen3MoeForCausalLM hold .*experts.* in other tensors",
    ),
    "NF4 of a mixture": (PACKED["olmoe"], ("model.quantization=nf4", OF_MIXTURE), r"only \d+% are in linear layers"),
    "NF4 on a disk": (PACKED["qwen2"], ("model.quantization=nf4", "deepspeed=DISK"), "keeps the base on a disk"),
    "a copy on a disk": (PACKED["qwen2"], (*WHOLE, "deepspeed=DISK"), "'nvme' found, expected 'cpu' or 'none' where a"),
    "no classifier": (PACKED["granite"], HEAD, "objective.reward: head needs a sequence classifier of transformers"),
    "no reference": (PACKED["qwen2"], ("generator.max_kl=1", *ASKED), "generator.max_kl: 1 given, but no loss"),
    "no such attention": (PACKED["gptj"], ("model.attention=packed",), "model.attention: there is no packed for GPTJ"),
    "a router's adapters": (PACKED["olmoe"], (), r"lora\.targets: in OlmoeForCausalLM it adapts .*experts"),
    "no linear layers": (GPT2, (), r"lora\.targets: GPT2LMHeadModel has no linear layer"),
    "a leak": (LEAKS["opt"], (), r"model\.base: OPTForCausalLM cannot be trained on packed rows"),
    "a leak without heads": (LEAKS["mamba"], (), r"model\.base: MambaForCausalLM cannot be trained on packed rows"),
    "dynamic positions": (
        llama(rope_parameters=rope_of("dynamic", 512)),
        (),
        "data.max_length: 2048 is past the 512 positions of this model, .*dyn",
    ),
    "LongRoPE": (
        llama(rope_parameters=rope_of("longrope", 512)),
        (),
        "data.max_length: 2048 is past the 512 positions of this model, .*longrope",
    ),
    "a config without sense": (llama(vocab_size=0), (), r"model\.base: config\.json of .*llama.*vocab_size: 0 found"),
    "an unknown activation": (llama(hidden_act="nonsense"), (), r"'nonsense' \(config\.json of .*llama"),
}
"""A model's config, changes to a recipe, and the message. DISK: a DeepSpeed file that keeps weights on NVMe."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_what_training_refuses(tmp_path: Path, case: str) -> None:
    """With the same message, from the recipe and config.json alone; no weights are there."""
    config, overrides, message = REFUSED[case]
    config.save_pretrained(tmp_path)
    offloaded = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    disk = tmp_path / "disk.json"
    disk.write_text(json.dumps({"zero_optimization": offloaded}))
    name = "uft_online_qwen32b" if "generator.by=builtin" in overrides else "uft_mistral7b"
    given = [f"model.base={tmp_path}", *(override.replace("DISK", str(disk)) for override in overrides)]
    settings = load_settings(name, tuple(given))
    with pytest.raises(UserError, match=message) as by_training:
        check_recipe(with_deepspeed_file(settings))
    with pytest.raises(UserError) as by_plan:
        make_plan(settings, cluster(gpus=4))
    assert str(by_plan.value) == str(by_training.value)


def test_ranks_that_cannot_share_rows_are_ruled_out_in_trainings_words() -> None:
    """No refusal, because other options than `--gpus 3` will do."""
    found = tiny("model.attention=packed", "launch.sequence_parallel=2", gpus=3)
    settings = with_deepspeed_file(load_settings("uft_mistral7b", ("launch.sequence_parallel=2",)))
    with pytest.raises(UserError) as by_training:
        check_sharding(settings, ranks=3, ranks_per_node=3)
    assert found.outcome.problems == (str(by_training.value),)


def test_lengths_up_to_the_models_positions_are_planned(tmp_path: Path) -> None:
    """Of a model whose positions change beyond them."""
    llama(rope_parameters=rope_of("dynamic", 512)).save_pretrained(tmp_path)
    assert plan(f"model.base={tmp_path}", "data.max_length=512", gpus=2).outcome.fits


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
