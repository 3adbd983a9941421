"""The recipe: what loads, what overrides do, and that each refusal names the recipe and the key."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes import MINIMAL, refusal
from typer.testing import CliRunner

from uft_ds.cli import app
from uft_ds.data.example import KINDS
from uft_ds.data.mixture import Portion
from uft_ds.errors import UserError
from uft_ds.recipe.described import describe_keys
from uft_ds.recipe.file import (
    described_recipes,
    dump_recipe,
    dump_value,
    load_recipe,
    load_yaml,
    read_yaml_file,
    shipped_recipes,
)
from uft_ds.recipe.schema import Recipe
from uft_ds.recipe.to_settings import portion_of


def test_recipes_are_shipped() -> None:
    """The three recipes of the first version are found without a path."""
    assert {"quickstart", "uft_qwen32b", "uft_mistral7b"} <= set(shipped_recipes())


def test_every_shipped_recipe_says_what_it_is_for() -> None:
    """In the first line of its file, which `uft recipe list` shows beside its name."""
    described = described_recipes()
    assert tuple(described) == shipped_recipes()
    for description in described.values():
        assert 20 < len(description) < 120
        assert description.endswith(".")
    assert described["uft_mistral7b"].startswith("UFT on Mistral-7B-v0.1 as in arXiv 2410.21438: UltraChat")
    shown = CliRunner().invoke(app, ["recipe", "list"]).stdout
    assert all(name in shown and description.split()[0] in shown for name, description in described.items())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    """Each shipped file is valid and calls itself by its file's name."""
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_is_dumped_loads_to_an_equal_recipe(name: str, tmp_path: Path) -> None:
    """The resolved recipe beside a run is the run's recipe."""
    other = "pair: bradley_terry" if name == "reward_mistral7b" else "instruction: nll"
    recipe = load_recipe(name, ("train.lr=1.5e-7", "objective.center=none", f"objective.loss={{{other}, score: bce}}"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@given(
    name=st.text(min_size=1, max_size=8, alphabet="0123456789eE+-._: #'\"\\nul~yä\u2028\t\n")
    | st.from_regex(r"[0-9]+e[0-9]+", fullmatch=True),
    lr=st.floats(min_value=1e-12, max_value=1e12),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_and_number_survives_dump_and_load(name: str, lr: float, tmp_path: Path) -> None:
    """Text that looks like a number, such as the commit `7e12345`, stays text, and no digit of a number is lost."""
    tree = yaml.safe_load(MINIMAL)
    tree["name"], tree["model"]["revision"], tree["train"] = name, name, {"lr": lr}
    recipe = Recipe.model_validate(tree)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(str(path)) == recipe


def test_defaults_are_the_papers(minimal: str) -> None:
    """UFT's choices: squared error, beta 0.01, no shift, LoRA rank 16 without dropout."""
    recipe = load_recipe(minimal)
    assert [recipe.objective.given.losses_of(kind) for kind in KINDS] == [{"mse": 1.0}] * 4
    assert (recipe.objective.beta, recipe.objective.reward_shift) == (0.01, "none")
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.dropout) == (16, 0.0)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=010", "train.steps", 10),
        ("train.steps=08", "train.steps", 8),
        ("train.steps=1_000", "train.steps", 1000),
        ("train.steps=0x10", "train.steps", 16),
        ("train.steps=0o10", "train.steps", 8),
        ("train.lr=01.5", "train.lr", 1.5),
        ("train.lr=.5", "train.lr", 0.5),
        ("train.lr=1.e-3", "train.lr", 1e-3),
        ("train.lr=1e-5", "train.lr", 1e-5),
        ("train.lr=1E-5", "train.lr", 1e-5),
        ("train.lr=.5e-3", "train.lr", 5e-4),
        ("train.lr=1", "train.lr", 1.0),
        ("train.steps=null", "train.steps", None),
        ("data.sources.1.examples=7", "data.sources.1.examples", 7),
        ("data.sources.0.score=0.25", "data.sources.0.score", 0.25),
        ("lora.targets=[q_proj, v_proj]", "lora.targets", ["q_proj", "v_proj"]),
        ("tracking=[]", "tracking", []),
        ("model.revision='7e12345'", "model.revision", "7e12345"),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_overrides_reach_every_leaf(minimal: str, override: str, key: str, value: object) -> None:
    """A leaf is replaced by a YAML value: exponents without a dot, list items by index, null, whole lists."""
    node: object = load_recipe(minimal, (override,)).model_dump()
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]  # type: ignore[index]
    assert node == value
    assert type(node) is type(value)


def test_an_override_of_a_list_item_leaves_the_rest(minimal: str) -> None:
    """Only the named leaf of the second source changes."""
    before, after = load_recipe(minimal), load_recipe(minimal, ("data.sources.1.path=c.jsonl",))
    assert after.data.sources[0] == before.data.sources[0]
    assert after.data.sources[1].model_dump() == before.data.sources[1].model_dump() | {"path": "c.jsonl"}


def test_the_last_override_wins(minimal: str) -> None:
    """Overrides apply in the order of the command line."""
    assert load_recipe(minimal, ("train.lr=1", "train.lr=2")).train.lr == 2


def test_home_is_expanded_in_locations_only(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~/x` is a path in the home folder where a path is meant; of a user who does not exist there is none."""
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = load_recipe(minimal, ("output=~/runs", "name=~/runs", "model.base=./~no-such-user/model"))
    assert (recipe.output, recipe.name, recipe.model.base) == ("/somewhere/runs", "~/runs", "./~no-such-user/model")
    with pytest.raises(UserError, match=r"output: '~no-such-user/x' given; a user's home.*no user 'no-such-user'"):
        load_recipe(minimal, ("output=~no-such-user/x",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("train.sede=1", "train.sede: unknown key; did you mean 'seed'?"),
        ("lora.rnk=8", "lora.rnk: unknown key; did you mean 'rank'?"),
        ("data.sources.1.exmaples=8", "data.sources.1.exmaples: unknown key; did you mean 'examples'?"),
        ("objective.gamma=2", "objective.gamma: unknown key; here it is objective.simpo_margin"),
        ("train.learning_rate=1e-5", "train.learning_rate: unknown key; here it is train.lr"),
        ("lora.foo=1", "lora.foo: unknown key; known here: rank, alpha, dropout, targets, experts, dtype"),
        ("train.max-grad-norm=1", "train.max-grad-norm: unknown key; did you mean 'max_grad_norm'?"),
        ("my-key=1", "my-key: unknown key; known here: name, model,"),
        ("lr=1e-5", "lr: unknown key; did you mean 'train.lr'?"),
        ("seed=1", "seed: unknown key; did you mean 'train.seed'?"),
        ("beta=0.1", "beta: unknown key; did you mean 'objective.beta'?"),
        ("epochs=2", "epochs: unknown key; did you mean 'data.sources.0.epochs' or 'train.epochs'?"),
        ("steps=2", "steps: unknown key; did you mean 'train.steps'?"),
        ("step=2", "step: unknown key; did you mean 'train.steps'?"),
        ("model.lr=2", "model.lr: unknown key; did you mean 'train.lr'?"),
        ("train.rank=2", "train.rank: unknown key; did you mean 'lora.rank'?"),
        ("LR=1e-5", "LR: unknown key; did you mean 'train.lr'?"),
        ("data.sources.0.lr=1", "data.sources.0.lr: unknown key; did you mean 'train.lr'?"),
        ("model.load_in_4bit=true", "model.load_in_4bit: unknown key; a base in 4 bits is model.quantization: nf4"),
        (
            "model.quantization_config={load_in_8bit: true}",
            "quantization_config: unknown key; a base in 4 bits is model.quantization: nf4",
        ),
        (
            "lora.targets=q_proj",
            "lora.targets: 'q_proj' given; input should be 'all-linear', or a valid list: [q_proj]",
        ),
        ("tracking=wandb", "tracking: 'wandb' given; input should be a valid list: [wandb]"),
        ("train.str=1", "train.str: unknown key; known here: examples_per_step,"),
        (
            "data.sources.0.format=helpstear2",
            "data.sources.0.format: unknown name 'helpstear2'; did you mean 'helpsteer2'",
        ),
        ("data.held_out=[{format: x, path: p}]", "data.held_out.0.format: unknown name 'x'; allowed: jsonl, trl,"),
        ("objective.loss=bse", "objective.loss: unknown name 'bse'; did you mean"),
        ("objective.loss=zzz", "objective.loss: unknown name 'zzz'; allowed: mse, bce, l1, raw, dpo"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(minimal: str, override: str, message: str) -> None:
    """A misspelt key or name is refused by its place, with the nearest known one or all of them."""
    assert message in refusal(minimal, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=3.5", "train.steps: 3.5 given"),
        ("train.steps=3.0", "train.steps: 3.0 given"),
        ("train.steps='3'", "train.steps: '3' given"),
        ("train.steps=true", "train.steps: True given"),
        ("train.examples_per_step=0", "train.examples_per_step: 0 given"),
        ("train.deterministic=1", "train.deterministic: 1 given"),
        ("train.schedule=step", "train.schedule: 'step' given; input should be 'cosine', 'linear' or 'constant'"),
        ("train.lr=abc", "train.lr: 'abc' given"),
        ("train.lr=.nan", "train.lr: nan given"),
        ("train.lr=.inf", "train.lr: inf given"),
        ("train.lr=1e999", "train.lr: inf given"),
        ("train.lr=-1e-5", "train.lr: -1e-05 given"),
        pytest.param("train.steps=[" + "1, " * 5000 + "1]", "train.steps: [1, 1, 1, ", id="a long list"),
        ("train.steps=1:30", "train.steps: '1:30' given"),
        ("train.steps=190:20:30", "train.steps: '190:20:30' given"),
        ("train.lr=1:30.5", "train.lr: '1:30.5' given"),
        ("train.steps=0b11", "train.steps: '0b11' given"),
        ("train.examples_per_step=100000000000", "train.examples_per_step: 100000000000 given"),
        ("train.examples_per_step=2147483647", "train.examples_per_step: 2147483647 given"),
        ("train.lr=null", "train.lr: null given; input should be a valid number"),
        ("train.warmup=1.5", "train.warmup: 1.5 given"),
        ("name=2024-01-31", "name: datetime.date(2024, 1, 31) given"),
        ("name=7e12345", "name: inf given"),
        ("data.sources.0.score=2", "data.sources.0.score: 2 given"),
        ("data.sources=[]", "data.sources: [] given"),
        ("data.sources.0=x", "data.sources.0: 'x' given; input should be keys and values (format, path, split,"),
        ("launch.ranks=0", "launch.ranks: 0 given; input should be 'auto', or greater than 0"),
        ("data.sources.0.share=20%", "share: '20%' given; input should be a valid number, or a valid list"),
        ("data.sources.0.share=[[0, 2], [1, 1]]", "data.sources.0.share.0.1: 2 given; input should be less"),
        ("data.sources.0.where={dict: null}", "data.sources.0.where.dict: null given; input should be a valid string"),
        ("data.sources.0.where={my-col: [1]}", "data.sources.0.where.my-col: [1] given"),
        ("launch.collective_timeout_minutes=[1]", "launch.collective_timeout_minutes: [1] given"),
        ("lora.targets=[q, 3]", "lora.targets.1: 3 given"),
        (
            "lora=3",
            "lora: 3 given; input should be keys and values (rank, alpha, dropout, targets, experts, dtype), or null "
            "(all parameters are trained, without adapters)",
        ),
        ("lora=none", "or null (all parameters are trained, without adapters); did you mean lora=null?"),
        ("lora=false", "lora: False given; input should be keys and values"),
        ("lora=off", "did you mean lora=null?"),
        ("train.steps=None", "did you mean train.steps=null?"),
        ("data.sources.0.score_by=no", "did you mean data.sources.0.score_by=null?"),
        ("data.sources.0.score_range=[1]", "data.sources.0.score_range: [1] given; list should have at least 2"),
        ("data.sources.0.score_range=[10, 1]", "score_range: [10, 1] given, expected [lowest, highest], such as"),
        ("data.sources.0.score_range=[1, 1]", "score_range: [1, 1] given, expected [lowest, highest]"),
        (
            "data.sources.0={format: jsonl, path: a, mixed_kinds: true, score_map: quantile}",
            "data.sources.0.score_map: quantile would rank the scores of one kind among those of others",
        ),
        ("data.sources.0.score_map=[.nan, 0]", "data.sources.0.score_map.0: nan given; input should be a finite"),
        ("train.betas=[0.9]", "train.betas: [0.9] given"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: 1.0 given"),
        ("lora.targets=[]", "lora.targets: [] given"),
        ("output=''", "output: '' given"),
        ("tracking=[mlflow]", "tracking.0: 'mlflow' given"),
        ("objective.loss.instruction=3", "objective.loss.instruction: 3 given"),
        ("objective.beta=0", "objective.beta: 0 given"),
        ("train=3", "train: 3 given; input should be keys and values (examples_per_step, tokens_per_micro_batch,"),
        ("train.seed=18446744073709551616", "train.seed: 18446744073709551616 given; input should be less than 9223"),
        ("train.steps=2147483648", "train.steps: 2147483648 given; input should be less than 2147483648"),
        ("data.max_length=99999999999999999999", "data.max_length: 99999999999999999999 given; input should be less"),
        ("train.lr=1e300", "train.lr: 1e+300 given; input should be less than or equal to 3.4e+38"),
        ("objective.beta={pair: 1e39}", "objective.beta.pair: 1e+39 given; input should be less"),
        (
            "objective.reward_shift_value=-1e39",
            "value: -1e+39 given; input should be greater than or equal to -3.4e+38",
        ),
        ("train.weight_decay=1e39", "train.weight_decay: 1e+39 given; input should be less"),
        ("data.sources.0.epochs=1e300", "data.sources.0.epochs: 1e+300 given; input should be less"),
        ("launch.collective_timeout_minutes=1e300", "launch.collective_timeout_minutes: 1e+300 given; input should be"),
    ],
)
def test_a_wrong_value_is_refused(minimal: str, override: str, message: str) -> None:
    """Types are not converted, ranges are checked, and NaN is no number; the message gives key and value."""
    setup = ("objective.loss={instruction: mse, score: mse}",) if override.startswith("objective.loss") else ()
    refused = refusal(minimal, *setup, override)
    assert message in refused
    assert "Section" not in refused


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize(
    "key",
    [
        "model.base",
        "model.chat_template",
        "data.cache_dir",
        "data.sources.1.path",
        "reference.adapter",
        "reference.cache_dir",
        "start.adapter",
        "deepspeed",
        "output",
    ],
)
def test_an_empty_path_is_refused(minimal: str, key: str, text: str) -> None:
    """A shell's variable that is not set: it would be the working directory, or an adapter that is left out."""
    assert f"{key}: {text!r} given; an empty text, expected a path" in refusal(minimal, f"{key}={text!r}")


@pytest.mark.parametrize("key", ["name", "model", "data", "output"])
def test_what_is_missing_is_named(key: str, tmp_path: Path) -> None:
    """A key without a default must be given."""
    tree = yaml.safe_load(MINIMAL)
    del tree[key]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert refusal(str(path)) == f"recipe {path}: {key}: required, but not given"


def test_all_problems_are_told_at_once(minimal: str) -> None:
    """Two wrong keys give two lines."""
    message = refusal(minimal, "train.lr=x", "train.seed=x")
    assert [line.split(": ")[1] for line in message.splitlines()] == ["train.lr", "train.seed"]
    message = refusal(minimal, "lora.dropout=0.1", "objective.reward_shift=ema", "objective.loss=nll")
    assert [line.split(": ")[1] for line in message.splitlines()] == ["lora.dropout", "objective.reward_shift"]


@pytest.mark.parametrize("key", ["data.sources.1.path=a.jsonl", "data.held_out=[{format: jsonl, path: b.jsonl}]"])
def test_a_source_given_twice_is_refused(minimal: str, key: str) -> None:
    """No row is trained on twice in an epoch, nor held out and trained on; another split, or `where`, is another."""
    place = "data.held_out.0" if "held_out" in key else "data.sources.1"
    assert f"{place}.path: " in refusal(minimal, key)
    assert "is a source already" in refusal(minimal, key)
    load_recipe(minimal, (key, f"{place}.split=test"))
    load_recipe(minimal, (key, f"{place}.where={{part: test}}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.0={format: jsonl, path: a, epochs: 2.0, share: 0.5}", "share: given together with `epochs`"),
        ("data.sources.0.share=0", "share: 0 takes nothing"),
        ("data.sources.0.share=[[0, 0], [0.5, 0.0], [1, 0]]", "share: 0 takes nothing"),
        ("data.sources.0.share=[[0, 0.5]]", "share: a schedule's progress must rise from 0 to 1, found [0.0]"),
        ("data.sources.0.share=[[0, 0.5], [0.5, 0], [0.5, 1], [1, 1]]", "must rise from 0 to 1, found [0.0, 0.5, 0.5,"),
        ("data.sources.0.share=[[0, 0.5, 1]]", "share"),
        ("data.sources.0.share=1.5", "share"),
        ("data.sources.0.epochs=0", "epochs"),
        (
            "data.held_out=[{format: jsonl, path: p, share: 0.5}]",
            "held_out.0.share: held-out data is gone through once",
        ),
    ],
)
def test_a_portion_that_means_nothing_is_refused(minimal: str, override: str, message: str) -> None:
    """How much of a source is taken is said once, and makes sense."""
    assert message in refusal(minimal, override)


def test_a_share_may_be_a_schedule(minimal: str) -> None:
    """Points of the run's progress with their shares; written down and read again, they are the same."""
    recipe = load_recipe(minimal, ("data.sources.0.share=[[0, 0.9], [0.5, 0.9], [1, 0.1]]",))
    Path(minimal).write_text(dump_recipe(recipe))
    assert load_recipe(minimal) == recipe
    assert portion_of(recipe.data.sources[0]).share == ((0.0, 0.9), (0.5, 0.9), (1.0, 0.1))
    assert portion_of(load_recipe(minimal, ("data.sources.0.share=0.25",)).data.sources[0]).share == ((0.0, 0.25),)
    assert portion_of(load_recipe(minimal, ("data.sources.0.share=null",)).data.sources[0]) == Portion(passes=1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference.adapter=/a", "reference.adapter: /a given, but with lora: null all parameters are trained; merge"),
        ("start.adapter=/a", "start.adapter: /a given, but with lora: null all parameters are trained; merge"),
        ("objective={reward: head, loss: bce}", "objective.reward: head given, but with lora: null"),
        ("generator={by: vllm, url: 'http://a'}", "generator.by: vllm given, but with lora: null"),
    ],
)
def test_without_adapters_what_needs_them_is_refused(minimal: str, override: str, message: str) -> None:
    load_recipe(minimal, ("lora=null",))
    assert message in refusal(minimal, "lora=null", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective={reward: head, loss: bce}", "lora.experts: true given, but a reward model"),
        (
            "data.sources.0={format: prompts, path: p.jsonl, answers: 2, score_by: length}",
            "lora.experts: true given, but the policy also answers itself",
        ),
    ],
)
def test_what_adapters_of_experts_cannot_do_is_refused(minimal: str, override: str, message: str) -> None:
    """They have no place in a server's or a reward model's adapter."""
    load_recipe(minimal, ("lora.experts=true",))
    assert message in refusal(minimal, "lora.experts=true", override)


@pytest.mark.parametrize("dropout", ["0.05", "-0.1", ".nan", "1"])
def test_dropout_is_refused(minimal: str, dropout: str) -> None:
    """Adapter dropout must be exactly 0."""
    assert "lora.dropout: " in refusal(minimal, f"lora.dropout={dropout}")


def test_a_sequence_must_fit_a_micro_batch(minimal: str) -> None:
    """max_length may equal tokens_per_micro_batch, not exceed it."""
    assert load_recipe(minimal, ("data.max_length=100", "train.tokens_per_micro_batch=100")).data.max_length == 100
    message = refusal(minimal, "data.max_length=101", "train.tokens_per_micro_batch=100")
    assert "train.tokens_per_micro_batch: 100 is less than data.max_length 101" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.2.path=x", "data.sources.2: expected an index from 0 to 1"),
        ("data.sources.-1.path=x", "data.sources.-1: expected an index from 0 to 1"),
        ("data.sources.first.path=x", "data.sources.first: expected an index from 0 to 1"),
        pytest.param("data.sources." + "9" * 5000 + ".path=x", "expected an index from 0 to 1", id="many digits"),
        ("data.sources.².path=x", "data.sources.²: expected an index from 0 to 1"),
        ("name.x=1", "name.x: its parent is 'small' and has no keys"),
        ("train.lr", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("name=[1", "the value is not YAML"),
        ("name=2024-13-45", "the value is not YAML"),
        ('train.steps=!!int ""', "the value is not YAML ('' is no int"),
        ('output="a\\0b"', "the value is not YAML ('a\\x00b': a text must not hold"),
        ('data.sources.0.path="a\\ud800"', "the value is not YAML ('a\\ud800': a text must not hold"),
        ("name=" + "[" * 3000, "the value is not YAML"),
        ("name={a: 1, a: 2}", "key 'a' is given twice"),
        ("name={[a]: 1}", "a key must be a word"),
    ],
)
def test_a_bad_override_is_refused(minimal: str, override: str, message: str) -> None:
    """An override that leads nowhere, or has no value, is quoted in the message, its beginning where it has no end."""
    refused = refusal(minimal, override)
    assert message in refused
    assert f"override {repr(override)[:200]}" in refused
    assert len(refused) < 1000


@pytest.mark.parametrize(
    ("override", "whole"),
    [("lora.rank=8", "lora={rank: 8}"), ("lora.targets=[q_proj]", "lora={targets: [q_proj]}")],
)
def test_a_key_of_adapters_that_the_recipe_lacks_is_told_what_it_would_mean(
    minimal: str, override: str, whole: str
) -> None:
    """With `lora: null` it would be another run; what is told to write is accepted."""
    message = refusal(minimal, "lora=null", override)
    assert (
        f"override {override!r}: {override.partition('=')[0]}: the recipe has lora: null, so all parameters" in message
    )
    assert message.endswith(f"; {whole} makes it a run in which adapters are trained instead")
    assert load_recipe(minimal, ("lora=null", whole)).lora is not None


def test_no_index_into_an_empty_list(tmp_path: Path) -> None:
    """There is no first item to override."""
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("data:\n", "data:\n  held_out: []\n"))
    assert "data.held_out.0: the list is empty" in refusal(str(path), "data.held_out.0.path=x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "name: again\n", ": line 8: key 'name' is given twice"),
        (MINIMAL + "train:\n  lr: 1\n  seed: 1\n  lr: 2\n", ": line 11: key 'lr' is given twice"),
        (MINIMAL + "train: {lr: [1\n", ":9: not valid YAML"),
        (
            MINIMAL + "tracking: 2024-02-30\n",
            ":8: not valid YAML: '2024-02-30' is no timestamp (day is out of range for month)",
        ),
        (MINIMAL + "tracking: !!int ''\n", ":8: not valid YAML: '' is no int"),
        (MINIMAL + "tracking: !!bool maybe\n", ":8: not valid YAML: 'maybe' is no bool"),
        (MINIMAL + "tracking: !!timestamp foo\n", ":8: not valid YAML: 'foo' is no timestamp"),
        (MINIMAL + f"tracking: {'[' * 3000 + ']' * 3000}\n", ": not valid YAML: nested too deeply"),
        (MINIMAL + f"tracking: {'9' * 5000}\n", ":8: not valid YAML: '999"),
        (MINIMAL + "a: \x07\n", ": not valid YAML: unacceptable character #x0007"),
        (MINIMAL + "? [a]\n: 1\n", ": line 8: a key must be a word"),
        (MINIMAL + "tracking: !!python/name:os.system\n", ":8: not valid YAML"),
        ("- 1\n", ": expected keys and values, found list"),
        ("", ": expected keys and values, found NoneType"),
        (MINIMAL + "1: 2\n", ": 1: "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Duplicated keys, broken YAML and tags that would run code are refused, with the line where one is known."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert f"recipe {path}{message}" in refusal(str(path))


def test_an_unknown_recipe_gives_the_nearest_shipped_name() -> None:
    """A misspelt shipped name is neither a crash nor read as a path."""
    with pytest.raises(UserError, match=r"recipe: unknown name 'quickstrat'; did you mean 'quickstart'\?"):
        load_recipe("quickstrat")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are not UTF-8 are the user's to mend."""
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        assert {
            "missing.yaml": "no such file; did you mean",
            "latin.yaml": "byte 6 is not UTF-8",
            tmp_path.name: "is a folder, expected a YAML file; it holds latin.yaml",
        }[path.name] in refusal(str(path))
    assert refusal(str(tmp_path / "laitn.yaml")).endswith(f"no such file; did you mean {tmp_path / 'latin.yaml'}?")
    assert refusal("quickstrat.yaml").endswith("no such file; did you mean quickstart?")
    assert refusal("nowhere/a.yaml").endswith(
        f"no such file (nowhere is no folder); shipped: {', '.join(shipped_recipes())}"
    )


def test_a_pipe_as_recipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe without a writer would hold the command for ever; the shell's `<(...)` ends and is read."""
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "cannot be read (not a regular file)" in refusal(str(tmp_path / "pipe.yaml"))
    reading, writing = os.pipe()
    os.write(writing, b"name: x\n")
    os.close(writing)
    assert read_yaml_file(Path(f"/dev/fd/{reading}"), "recipe", ()) == "name: x\n"
    os.close(reading)


def test_a_recipe_cannot_be_changed(minimal: str) -> None:
    """What was validated is what runs."""
    recipe = load_recipe(minimal)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0


def test_every_key_is_described() -> None:
    """`uft recipe keys` has a meaning for each leaf, sources' and sections' among them."""
    rows = describe_keys()
    keys = [row.key for row in rows]
    assert {"train.lr", "data.sources.0.path", "data.held_out.0.score", "lora.rank", "output"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert [row.key for row in rows if not row.meaning] == []


def test_keys_list_the_words_that_they_allow() -> None:
    """Of each closed choice, of lists' members too; a default is one line of YAML."""
    rows = {row.key: row for row in describe_keys()}
    assert rows["train.schedule"].allowed == ("cosine", "linear", "constant")
    assert rows["tracking"].allowed == ("tensorboard", "wandb")
    assert rows["launch.ranks"].allowed == ("auto",)
    assert rows["model.gradient_checkpointing"].allowed == ("true", "false", "selective", "auto")
    assert rows["objective.reward_shift"].allowed == ("none", "constant", "ema", "kl", "prompt_mean")
    assert rows["reference.mode"].allowed == ("lockstep", "separate")
    assert "helpsteer2" in rows["data.held_out.0.format"].allowed
    assert rows["train.lr"].allowed == rows["data.sources.0.where"].allowed == ()
    assert (rows["train.betas"].default, rows["tracking"].default) == ("[0.9, 0.95]", "[tensorboard]")
    assert rows["train.steps"].default == "null"
    assert all("\n" not in row.default for row in rows.values())
    for row in rows.values():  # each of them is accepted, or refused for another reason than its word
        if row.default not in ("(required)", "null") and row.allowed:
            assert any(word in row.default for word in row.allowed), row


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.keep_best=loss",), "train.keep_best: 'loss' is not a held-out metric, such as held_out/loss"),
        (
            ("train.keep_best=held_out/responses/score",),
            "train.keep_best: 'held_out/responses/score' given, which has no best value; take held_out/loss, ",
        ),
        (("train.keep_best=held_out/loss",), "train.keep_best: needs data.held_out, which is empty"),
        (("train.samples=4",), "train.samples: 4 given, but data.held_out, which has the prompts, is empty"),
        (
            ("model.attention=flash_attention_2", "model.dtype=float32"),
            "model.attention: flash_attention_2 has no float32; take model.dtype: bfloat16, or auto",
        ),
    ],
)
def test_what_could_never_be_is_refused(minimal: str, overrides: tuple[str, ...], message: str) -> None:
    """Before anything is read: the best of what is not evaluated; a kernel for a type that it lacks."""
    assert message in refusal(minimal, *overrides)


def test_the_best_checkpoint_needs_evaluations_where_checkpoints_are(minimal: str) -> None:
    """Every 70 and every 100 steps meet at 700 alone."""
    held_out = "data.held_out=[{format: jsonl, path: held_out.jsonl}]"
    message = refusal(
        minimal, held_out, "train.keep_best=held_out/loss", "train.evaluate_every=70", "train.checkpoint_every=100"
    )
    assert "train.keep_best: needs evaluations where checkpoints are" in message
    load_recipe(
        minimal,
        (held_out, "train.keep_best=held_out/loss", "train.evaluate_every=50", "train.checkpoint_every=100"),
    )


@pytest.mark.parametrize(
    "value", ["010", "0o10", "1:30", "1e-5", "1.0e3", "0b1", "yes", "2024-01-31", "", "a: b", 1, 1e-5]
)
def test_a_dumped_value_is_read_as_what_it_was(value: Any) -> None:
    """Texts that look like numbers stay texts, by the rules of both versions of YAML."""
    found = load_yaml(dump_value(value))
    assert found == value
    assert type(found) is type(value)


def test_a_value_without_end_is_cut(minimal: str) -> None:
    """A few lines of YAML with aliases hold a million leaves; the message shows their beginning."""
    message = refusal(minimal, "train.steps=[" + "1, " * 5000 + "1]")
    assert message.split(" given; ")[0].endswith("...")
    assert len(message) < 1000
