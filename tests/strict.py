"""`UFT_TEST_STRICT=1`: a test that would be skipped fails, and says what this machine lacks.

A suite in which tests are skipped looks as green as one in which they pass. On a user's machine that is what is
wanted; in CI everything can be had, so there a skip is a fault of the machine's set-up.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

VARIABLE = "UFT_TEST_STRICT"


def is_strict() -> bool:
    """Whether skips are failures."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """A skip in a test, a fixture or a mark."""
    outcome = yield
    _fail_if_skipped(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """A skip of a whole module."""
    outcome = yield
    _fail_if_skipped(outcome.get_result())


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not is_strict() or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{VARIABLE} is set, and this would be skipped: {reason.removeprefix('Skipped: ')}"
