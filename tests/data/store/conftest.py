"""Fixtures of the tests of stores."""

from pathlib import Path

import pytest
from forking import forking
from tiny import build_tiny_tokenizer

from uft_ds.data.store import building
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def chat(tokenizer_folder: Path) -> ChatTokenizer:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that tokenise do not import transformers for seconds first; but for that they are spawned ones."""
    context = forking()
    monkeypatch.setattr(building.multiprocessing, "get_context", lambda method: context)
