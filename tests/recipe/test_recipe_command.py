"""`uft recipe keys` and `show` answer a name that is not one."""

import pytest
from typer.testing import CliRunner

from uft_ds.commands.recipe import app
from uft_ds.errors import UserError


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_section_has_its_own_keys() -> None:
    """Or a part of one, or a single key; each with its default and the words that it allows."""
    keys = [line.split(" = ")[0] for line in printed("keys", "train").splitlines() if not line.startswith(" ")]
    assert "train.lr" in keys
    assert all(key.startswith("train.") for key in keys)
    assert set(keys) < {line.split(" = ")[0] for line in printed("keys").splitlines()}
    assert printed("keys", "train.betas").startswith("train.betas = [0.9, 0.95]\n")
    assert "\n    allowed: cosine, linear, constant\n" in printed("keys", "train.schedule")
    assert "data.sources.0.score_range = null\n" in printed("keys", "data.sources")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keys", "lr"), "lr: unknown key; did you mean 'train.lr'?"),
        (("keys", "trian"), "trian: unknown key; did you mean 'train'?"),
        (("show", "quickstart", "--key", "lr"), "--key lr: unknown key; did you mean 'train.lr'?"),
        (("show", "quickstart", "--key", "learning_rate"), "--key learning_rate: unknown key; here it is train.lr"),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest(arguments: tuple[str, ...], message: str) -> None:
    """As an override would be."""
    with pytest.raises(UserError) as refused:
        printed(*arguments)
    assert str(refused.value) == message


def test_a_server_is_started_as_its_recipe_needs_it() -> None:
    """An argument a line: base, dtype and longest answer are the recipe's, and rank 20 needs vLLM's 32."""
    vllm = ("generator.by=vllm", "generator.url=http://node1:8000", "lora.rank=20", "model.dtype=bfloat16")
    words = printed("server", "quickstart_online", *vllm, "generator.served_model=base").split("\n")
    assert words[0].endswith("/SmolLM2-135M-Instruct")
    assert words[1:-1] == [
        *("--dtype", "bfloat16", "--served-model-name", "base", "--max-model-len", "192", "--enable-lora"),
        *("--max-lora-rank", "32", "--max-loras", "1", "--max-cpu-loras", "2", "--generation-config", "vllm"),
    ]
    assert words[-1] == ""
    hub = printed("server", "quickstart_online", *vllm, "model.base=org/name", "model.revision=1a2b").split("\n")
    assert hub[0] == "org/name"
    assert hub[hub.index("--revision") + 1] == "1a2b"


def test_a_recipe_without_a_server_has_none_to_start() -> None:
    """Its ranks answer themselves."""
    with pytest.raises(UserError, match=r"^generator\.by: builtin given"):
        printed("server", "quickstart_online")
