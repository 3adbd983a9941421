"""A tokenizer that cannot be read is refused by its file, and what to do about it."""

from pathlib import Path

import pytest
from tiny import build_tiny_model

from uft_ds.data.tokens.chat_tokenizer import open_tokenizer
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import load_for_generation


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "no tokenizer could be loaded from .*: expected tokenizer.json or tokenizer.model; "),
        ("tokenizer.json", "", "tokenizer.json: cannot be read .*; fetch the file again"),
        ("tokenizer.json", "null", "tokenizer.json: null found, expected an object"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json: \[\] found, expected an object"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length: 'x' found in .*, expected a number"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token has to be .*; correct its files, or fetch them again"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
            r"it needs code of its own \(auto_map in tokenizer_config.json\), which is never run",
        ),
    ],
)
def test_a_broken_tokenizer_is_refused_by_its_file(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """By a run and by a chat alike, in our own words: transformers advises to run the code, or to install packages."""
    folder = build_tiny_model(tmp_path / "model", "llama")
    (folder / "own.py").write_text("raise SystemExit")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"^model\.base: .*{message}"):
        open_tokenizer(str(folder))
    with pytest.raises(UserError, match=rf"^`{folder}` cannot be loaded as a model: .*{message}"):
        load_for_generation(folder)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one for some models and fails for others; every response would have no token."""
    for architecture, found in (("qwen2", "'Hello' has no tokens in it; expected"), ("llama", "expected")):
        folder = build_tiny_model(tmp_path / architecture, architecture)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=rf"^model\.base: no tokenizer could be loaded from .*: {found} tokenizer"):
            open_tokenizer(str(folder))
