"""The weights of a base as a run computes with them, whatever the files call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wrappers import build_wrapper

from uft_ds.streams.base_weights import base_weights
from uft_ds.streams.nf4 import Nf4Base, rounded


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "mistral3"])
def test_of_a_wrapper_the_language_models_layers_are_rounded(tmp_path: Path, name: str) -> None:
    """By the files' own names; what reads images, embeddings, norms and head are read as they are stored."""
    nf4 = Nf4Base(torch.bfloat16)
    folder = build_wrapper(tmp_path, name)
    plain, found = base_weights(folder, None), base_weights(folder, nf4)
    changed = 0
    for stored in plain.infos:
        before, after = plain.read(stored), found.read(stored)
        is_taken = "vis" not in stored and ".layers." in stored and before.dim() == 2
        changed += is_taken
        assert torch.equal(after, rounded(before, nf4) if is_taken else before), stored
    assert changed == 2 * 7
