"""A tiny model of every architecture, tied and untied, with a sliding window where there is one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from suites import long_but
from tiny import Architecture
from toy import build

WINDOW = 8
"""Far shorter than the toy sequences, so that a wrong window is seen."""


@dataclass(frozen=True)
class Variant:
    architecture: Architecture
    tied: bool = False
    sliding_window: int | None = None
    further: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "qwen2": Variant("qwen2"),
    "qwen2 tied": Variant("qwen2", tied=True),
    "qwen2 window": Variant("qwen2", sliding_window=WINDOW),
    "qwen3": Variant("qwen3"),
    "qwen3 tied": Variant("qwen3", tied=True),
    "qwen3 window": Variant("qwen3", sliding_window=WINDOW),
    "llama": Variant("llama"),
    "llama tied": Variant("llama", tied=True),
    "mistral": Variant("mistral"),
    "mistral tied": Variant("mistral", tied=True),
    "mistral window": Variant("mistral", sliding_window=WINDOW),
    "gemma2 tied": Variant("gemma2", tied=True, sliding_window=WINDOW),
    "gemma3 tied": Variant("gemma3_text", tied=True, sliding_window=WINDOW),
    "phi3": Variant("phi3"),
    "phi3 window": Variant("phi3", sliding_window=WINDOW),
    "granite": Variant("granite"),
    "granite tied": Variant("granite", tied=True),
    "olmo2": Variant("olmo2"),
    "gpt_neox": Variant("gpt_neox"),
    "gpt_neox in sequence": Variant("gpt_neox", further={"use_parallel_residual": False}),
}


ONE_OF_EACH = [
    "qwen2", "qwen3", "llama", "mistral window", "gemma2 tied", "gemma3 tied", "phi3", "granite", "olmo2", "gpt_neox",
    "gpt_neox in sequence",
]  # fmt: skip
"""Each class of layers once, among them two with a tied head and three with a window.

Enough for what depends on the layers' own code: whether a head is tied, and where a window ends, is nothing that a
family could do in a way of its own, and what does depend on it is tested of all variants.
"""


FAST = ("qwen2", "gemma2 tied", "gpt_neox")
"""In `make test`: biases; caps, a window, more norms and a tied head; and another layout of layers, heads and names.

Of all families packed steps are tried there too, by `test_a_packed_step_is_the_unpacked_one`.
"""


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant's random weights, by the variant's name; built when it is first asked for."""
    root = tmp_path_factory.mktemp("variants")

    def folder_of(name: str) -> Path:
        variant = VARIANTS[name]
        return build(
            root / name.replace(" ", "-"),
            variant.architecture,
            tied=variant.tied,
            sliding_window=variant.sliding_window,
            **variant.further,
        )

    return folder_of


@pytest.fixture(scope="session", params=long_but(FAST, VARIANTS))
def folder(request: pytest.FixtureRequest, variants: Callable[[str], Path]) -> Path:
    """The folder of one variant's random weights, of every variant in turn."""
    return variants(request.param)


@pytest.fixture(scope="session", params=long_but(FAST, ONE_OF_EACH))
def family_folder(request: pytest.FixtureRequest, variants: Callable[[str], Path]) -> Path:
    """The folder of one family's random weights, of every family in turn."""
    return variants(request.param)
