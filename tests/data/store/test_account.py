"""What an index says of the rows, whichever version has written it."""

from __future__ import annotations

from typing import Any

import pytest

from uft_ds.data.store.account import Account
from uft_ds.data.store.refusal import range_hint

ACCOUNT = {"rows": 9, "dropped": {}, "changed": {}, "places": {}, "quarantined": 3, "skipped": 0}


@pytest.mark.parametrize(
    ("of_version", "hint"),
    [
        ({"is_outside": True}, "data: scores outside of its scale; all are from 2 to 4: "),
        ({"is_outside": False}, ""),
        ({"is_outside": True, "count": 9, "outside": 3}, "data: 3 of 9 scores outside of its scale;"),
        ({"count": 9, "outside": 3}, "data: 3 of 9 scores outside of its scale;"),
        ({"count": 9, "outside": 0}, ""),
    ],
)
def test_every_version_says_whether_a_score_is_outside(of_version: dict[str, Any], hint: str) -> None:
    """The first ones said it without counting; the hint on the scale is given all the same."""
    account = Account.from_json(ACCOUNT | {"scores": {"low": 2, "high": 4} | of_version})
    found = range_hint("data", account.scores)
    assert found.startswith(hint)
    assert bool(found) == bool(hint)
