"""How a run gets the same numbers again, and what it must not pay for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

from uft_ds.training.determinism import make_deterministic


@pytest.fixture
def process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what the function changes."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "before")
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.usefixtures("process_settings")
def test_deterministic_kernels_without_filled_memory() -> None:
    """An operation without a deterministic kernel is refused; what is allocated is not written to."""
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not all(bool(torch.empty(64).isnan().all()) for _ in range(3))
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert all(bool(torch.empty(64).isnan().all()) for _ in range(3)), "torch's own default would fill it"
