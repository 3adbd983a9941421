"""The units that a run uses, and the few that stand for them."""

from pathlib import Path

import numpy as np
from stores import singles, write
from toy import toy_sequences

from uft_ds.data.store.selection import Selection, write_sample
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.token_store import TokenStore


def test_a_selection_cuts_its_last_conversation(tmp_path: Path) -> None:
    """Of the last unit only so many responses are kept, with their keys, and nothing after them."""
    sequence = next(s for s in toy_sequences(30) if len(s.responses) == 3)
    store = write(tmp_path / "s", [((sequence,), Place(0, i, 0)) for i in range(3)])
    selection = Selection(store, np.array([2, 0]), last=2)
    assert selection.responses_U.tolist() == [3, 2]
    assert selection.num_responses == 5
    (cut,) = selection.unit(1)
    assert cut.num_tokens == cut.responses[-1].end == sequence.responses[1].end
    assert cut.response_keys == selection.keys_of(1) == sequence.response_keys[:2]
    assert len(selection.unit(0)[0].responses) == 3


def test_a_sample_stands_alone(tmp_path: Path) -> None:
    """The first units of the first selection that holds any, readable without the store that they came from."""
    empty, full = write(tmp_path / "empty", []), write(tmp_path / "full", singles(5))
    (tmp_path / "sample").mkdir()
    write_sample(tmp_path / "sample", [Selection(store, np.arange(len(store))) for store in (empty, full)])
    expected = [full.unit(i)[0].token_ids_T.tolist() for i in range(5)]
    for file in (tmp_path / "full").iterdir():
        file.unlink()
    sample = TokenStore(tmp_path / "sample", "data")
    assert [sample.unit(i)[0].token_ids_T.tolist() for i in range(len(sample))] == expected
    assert sample.origin(4) == "a.jsonl:5"
