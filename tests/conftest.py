"""Fixtures shared by all tests."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # pytest-xdist hands on a width, at which commands would fold their output

import gc
from pathlib import Path

import hypothesis
import pytest

# What is imported stays for good: half a million objects, which each full collection would visit, in half a second. The
# collector took a sixth of the time of finding the tests, and a fifteenth of running them.
gc.disable()

pytest_plugins = ["strict"]
# Tests against a server of one's own are there only where its address is given: without one they are nothing to skip.
collect_ignore = [] if os.environ.get("UFT_TEST_VLLM") else ["rollouts/test_vllm_server.py"]

pytest.register_assert_rewrite("engines", "recipes", "runs")  # they assert too, and a difference should be shown

# The same examples each time, so that a red run is red again; others by --hypothesis-profile=search. No deadline: on a
# busy machine it would fail whatever runs first.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", derandomize=False, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore:
        terminalreporter.write_line(f"not run: {', '.join(collect_ignore)} (UFT_TEST_VLLM gives no server)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first: of files that take minutes, none should be the last that a worker is given.

    Only the processes that run tests come here. The one that hands them out starts them first, and would let them wait
    for its own import of torch.
    """
    import torch
    from suites import slowest_first

    torch.set_num_threads(1)
    items.sort(key=lambda item: slowest_first(item.path))


def pytest_collection_finish() -> None:
    """Garbage is collected again, but not looked for in what is imported; all of the rest is visited rarely."""
    gc.freeze()
    gc.set_threshold(700, 10, 100)
    gc.enable()


def pytest_unconfigure() -> None:
    """As it was: libraries that count their objects at a process's end would report the frozen ones as lost."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Qwen2 with a byte-level ChatML tokenizer, in Hugging Face's layout."""
    from tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "qwen2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `mixture` runs for each family; the list is imported where a test asks for it, with what it imports."""
    if "mixture" in metafunc.fixturenames:
        from mixtures import FAST, MIXTURES
        from suites import long_but

        metafunc.parametrize("mixture", long_but(FAST, MIXTURES), indirect=True, scope="session")


@pytest.fixture(scope="session")
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts of one family."""
    from mixtures import build_mixture

    return build_mixture(tmp_path_factory.mktemp("mixture") / request.param, request.param)


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts of this family alone."""
    from mixtures import build_mixture

    return build_mixture(tmp_path_factory.mktemp("mixture") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data beside the project, found by UFT_TEST_DATA; tests that need it are skipped without."""
    import needs

    return needs.real_data()


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    """A recipe with every default."""
    from recipes import MINIMAL

    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)
