"""A log is not filled by the same warning."""

from __future__ import annotations

import logging
import warnings

import pytest

from uft_ds.host.library_warnings import each_once, quiet_bitsandbytes


def warn(text: str) -> None:
    warnings.warn(text, FutureWarning, stacklevel=1)


def test_a_warning_is_shown_once_whatever_other_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python forgets what it has shown when code enters `catch_warnings`; another text is another warning."""
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        for repeat in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ImportWarning)
            warn("without")
            assert len(shown) == repeat + 1, "the fault that this module is for"
        shown.clear()
        with each_once():
            for _ in range(3):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ImportWarning)
                warn("one")
                warn("two")
        assert shown == ["one", "two"]
        warn("after")
    assert shown == ["one", "two", "after"]


def test_bitsandbytes_tells_of_no_kernel_that_it_lacks() -> None:
    """Its warning on some CPUs, when it is imported, would come before everything that a command says."""
    quiet_bitsandbytes()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes.nn.modules").isEnabledFor(logging.WARNING)
