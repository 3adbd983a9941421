"""A reward model on the policy's base before a launch: what is recorded of it, and what is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reward_models import online_recipe, saved_reward_adapter
from runs import settings_of_run, write_recipe
from tiny import CHATML, build_tiny_model
from toy import saved_adapter

from uft_ds.data.tokens.padding import save_for_scoring
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.identity import run_identity
from uft_ds.run.prepare import prepare_run
from uft_ds.run.reward_stream import reward_model_of
from uft_ds.streams.identity import adapter_identity

KEY = "data.sources.0.score_by"


def prepared(recipe: Path, *overrides: str) -> RunFolder:
    folder, _, lock = prepare_run(settings_of_run(recipe, *overrides), overwrite=False)
    lock.close()
    return folder


def refused(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(recipe, *overrides)
    assert not (recipe.parent / "run").exists()
    return str(caught.value)


def reward_run(folder: Path, base: Path, **changes: Any) -> Path:
    """The adapter of a checkpoint of a prepared run; the run itself has trained nothing."""
    folder.mkdir(parents=True)
    run = prepared(write_recipe(folder, base, **changes))
    return saved_reward_adapter(base, run.checkpoints / "step-000001" / "adapter")


@pytest.fixture(scope="module")
def reward(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_run(tmp_path_factory.mktemp("rewards") / "reward", tiny_qwen2)


def test_its_content_is_in_the_identity(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """Of the run and of its environment, not its place; a run without one has no such key."""
    folder = prepared(online_recipe(tmp_path / "a", tiny_qwen2, reward))
    expected = adapter_identity(reward, KEY)
    assert json.loads(folder.identity.read_text())["reward"] == expected
    assert json.loads(folder.environment.read_text())["reward_adapter"] == expected
    plain = prepared(write_recipe((tmp_path / "b").resolve().parent, tiny_qwen2))
    assert "reward" not in json.loads(plain.identity.read_text())
    assert "reward_adapter" not in json.loads(plain.environment.read_text())


def test_beside_a_trained_base_its_adapter_is_refused(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """By its key, with what to give instead: an adapter of a base that changes is another model in each step."""
    message = refused(online_recipe(tmp_path, tiny_qwen2, reward), "lora=null")
    assert message.startswith(f"{KEY}: {reward} is an adapter on the policy's base, but with lora: null")
    assert "--to reward-model" in message


def test_another_reward_model_is_another_identity(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    other = reward_run(tmp_path / "other", tiny_qwen2)
    settings = [settings_of_run(online_recipe(tmp_path, tiny_qwen2, folder)) for folder in (reward, other)]
    assert adapter_identity(reward, KEY) == adapter_identity(other, KEY)
    (other / "adapter_model.safetensors").unlink()
    (other / "adapter_config.json").unlink()
    other.rmdir()
    saved_reward_adapter(tiny_qwen2, other, seed=8)
    data = prepare_data_of(settings[0])
    first, second = (run_identity(one, data, lambda *_: None)["reward"] for one in settings)
    assert first != second
    names = [found.identity(one) for one in settings if (found := reward_model_of(one)) is not None]
    assert [name["scorer"] for name in names] == ["reward:run/step-000001"] * 2
    assert names[0] != names[1]


def prepare_data_of(settings: Any) -> Any:
    from uft_ds.run.prepare import check_run

    return check_run(settings)[1]


def test_what_convert_writes_is_accepted(tiny_qwen2: Path, tmp_path: Path) -> None:
    """An adapter with the tokenizer as `uft convert --to adapter` saves it, whose template ends with the answer."""
    adapter = saved_reward_adapter(tiny_qwen2, tmp_path / "adapter")
    save_for_scoring(load_tokenizer(str(tiny_qwen2)), adapter)
    assert (adapter / "chat_template.jinja").read_text() != CHATML
    folder = prepared(online_recipe(tmp_path / "online", tiny_qwen2, adapter))
    assert json.loads(folder.identity.read_text())["reward"] == adapter_identity(adapter, KEY)


def test_another_base_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """By the content that its run recorded, whatever it is called; an adapter alone by the name that it gives,
    and one that gives none is refused."""
    base = build_tiny_model(tmp_path / "base", "qwen2", seed=1)
    of_run = reward_run(tmp_path / "reward", base)
    message = refused(online_recipe(tmp_path / "a", tiny_qwen2, of_run))
    assert message.startswith(f"{KEY}: {of_run} is of the run ")
    assert "a base of other content" in message
    alone = saved_reward_adapter(base, tmp_path / "alone")
    message = refused(online_recipe(tmp_path / "b", tiny_qwen2, alone))
    assert message.startswith(f"{KEY}: {alone} was trained on {base}")
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    message = refused(online_recipe(tmp_path / "d", tiny_qwen2, alone))
    assert message.startswith(f"{KEY}: {alone / 'adapter_config.json'}: base_model_name_or_path is not given")
    wider = build_tiny_model(tmp_path / "wider", "qwen2", num_hidden_layers=1)
    message = refused(online_recipe(tmp_path / "c", wider, of_run))
    assert message.startswith(f"{KEY}: ")
    assert "was trained on another model" in message


def test_another_template_or_tokenizer_is_refused(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """Of a run by the hash that it recorded; of a folder by its files, which must be there."""
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("'\\n'", "'\\n\\n'"))
    assert template.read_text() != CHATML
    message = refused(online_recipe(tmp_path / "a", tiny_qwen2, reward), f"model.chat_template={template}")
    assert message.startswith(f"{KEY}: the run {reward.parents[2]} has another tokenizer or chat template")
    adapter = saved_reward_adapter(tiny_qwen2, tmp_path / "adapter")
    message = refused(online_recipe(tmp_path / "b", tiny_qwen2, adapter))
    assert message.startswith(f"{KEY}: {adapter}: holds no tokenizer")
    save_for_scoring(load_tokenizer(str(tiny_qwen2), chat_template=str(template)), adapter)
    message = refused(online_recipe(tmp_path / "c", tiny_qwen2, adapter))
    assert message.startswith(f"{KEY}: {adapter} has another tokenizer or chat template")


def test_two_reward_models_are_refused(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """Two sources may share one; with two, both are named."""
    other = reward_run(tmp_path / "other", tiny_qwen2)
    recipe = online_recipe(tmp_path / "online", tiny_qwen2, reward)
    second = tmp_path / "more.jsonl"
    second.write_text('{"prompt": "More"}\n' * 4)
    source = f"{{format: prompts, path: {second}, answers: 2, score_by: {{by: reward:%s, map: 'affine:-9,9'}}}}"
    (first,) = settings_of_run(recipe).stored["data"]["sources"]
    given = f"{{format: prompts, path: {first['path']}, answers: 4, score_by: {{by: reward:{reward}, map: sigmoid}}}}"
    message = refused(recipe, f"data.sources=[{given}, {source % other}]")
    assert message.startswith(f"data.sources.1.score_by: reward:{other}: {KEY} names another reward model, {reward}")
    both = reward_model_of(settings_of_run(recipe, f"data.sources=[{given}, {source % reward}]"))
    assert both is not None
    assert both.sources == (0, 1)


def test_a_policys_adapter_is_no_reward_model(tiny_qwen2: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_qwen2, tmp_path / "adapter")
    message = refused(online_recipe(tmp_path / "a", tiny_qwen2, adapter))
    assert message.startswith(f"{KEY}: {adapter}: holds no base_model.model.score.weight, the head of a reward model")


def test_a_replay_attaches_none(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """All its scores are recorded."""
    recipe = online_recipe(tmp_path / "a", tiny_qwen2, reward)
    assert reward_model_of(settings_of_run(recipe)) is not None
    assert reward_model_of(settings_of_run(recipe, "generator.by=recorded", "generator.run=elsewhere")) is None


def test_a_reward_model_inside_the_output_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """--overwrite would empty the folder, and the reward model with it."""
    own = reward_run(tmp_path / "reward", tiny_qwen2)
    settings = settings_of_run(online_recipe(tmp_path / "a", tiny_qwen2, own), f"output={own.parents[2]}")
    with pytest.raises(UserError, match=rf"output: {KEY} .* lies inside {own.parents[2]}"):
        prepare_run(settings, overwrite=True)
    assert (own / "adapter_model.safetensors").is_file()
