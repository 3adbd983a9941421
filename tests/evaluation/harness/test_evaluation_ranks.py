"""Ranks that answer together: one that is lost is noticed, and no clock of another machine is needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.ranks import beating, check_count, watch


def test_a_rank_that_shows_nothing_new_is_lost(tmp_path: Path) -> None:
    """After two minutes since its file was seen to change, or a quarter of an hour without one."""
    now = [0.0]
    lost = watch(tmp_path, 3, now=lambda: now[0])
    assert lost() is None
    (tmp_path / "rank-1.alive").write_text("1")
    (tmp_path / "rank-2.alive").write_text("1")
    now[0] = 800.0
    assert lost() is None
    (tmp_path / "rank-1.alive").write_text("2")
    now[0] = 919.0
    assert lost() is None
    now[0] = 921.0
    assert lost() == "process 2 of 3 has not shown for 121 s that it lives"


def test_a_rank_that_never_comes_is_lost(tmp_path: Path) -> None:
    """It has time to start."""
    now = [0.0]
    lost = watch(tmp_path, 2, now=lambda: now[0])
    now[0] = 899.0
    assert lost() is None
    now[0] = 901.0
    assert lost() == "process 1 of 2 has not shown for 901 s that it lives"


def test_a_rank_shows_that_it_lives(tmp_path: Path) -> None:
    """As long as the block lasts."""
    with beating(tmp_path / "answers", 2):
        pass
    assert (tmp_path / "answers" / "rank-2.alive").exists()


def test_more_processes_than_gpus_are_refused() -> None:
    """Where there are GPUs."""
    check_count(8, 0)
    check_count(2, 2)
    with pytest.raises(UserError, match="3 given, but this machine has 2 GPUs"):
        check_count(3, 2)
