"""Stores: what was written comes back, from the disk, by index."""

from pathlib import Path

import numpy as np
from stores import ACCOUNT, pair, singles, write
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.token_store import TokenStore


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    """Tokens, spans, scores to the last bit, kinds, keys and places survive, over several chunks."""
    odd = Sequence(np.array([5, 2**31 - 1, 0], dtype=np.int32), (Response(1, 3, 1 / 3, "binary", ""),))
    chunks = (singles(7), [], [((odd,), Place(1, 2**40, 3))], singles(5))
    store = write(tmp_path / "s", *chunks)
    written = [unit for chunk in chunks for unit, _ in chunk]
    assert len(store) == len(written) == 13
    for index, (expected,) in enumerate(written):
        (read,) = store.unit(index)
        assert read.token_ids_T.tolist() == expected.token_ids_T.tolist()
        spans = [(r.start, r.end, r.score, r.kind, r.pair_id) for r in read.responses]
        assert spans == [(r.start, r.end, r.score, r.kind, None) for r in expected.responses]
        assert read.response_keys == expected.response_keys == store.keys_of(index)
    assert store.unit(7)[0].responses[0].origin == f"b.jsonl:{2**40}, item 3"
    assert store.unit(12)[0].responses[0].origin == "a.jsonl:5"
    assert store.account == ACCOUNT
    assert store.places_of("tie") == ("a.jsonl:1", "b.jsonl:3")
    assert store.places_of("trimmed") == ()


def test_counts_are_known_without_reading_tokens(tmp_path: Path) -> None:
    """Responses, sequences and tokens of each unit, as planning needs them."""
    units = [*singles(4), (pair(1), Place(0, 9, 0))]
    store = write(tmp_path / "s", units)
    assert store.responses_U.tolist() == [sum(len(s.responses) for s in unit) for unit, _ in units]
    assert store.tokens_U.tolist() == [sum(s.num_tokens for s in unit) for unit, _ in units]
    assert store.sequences_U.tolist() == [1, 1, 1, 1, 2]


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    """A sequence's tokens are a view of the file: all ranks of a machine share one copy of them."""
    (sequence,) = write(tmp_path / "s", singles(3)).unit(1)
    base = sequence.token_ids_T
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not sequence.token_ids_T.flags.writeable


def test_a_pair_comes_back_as_one(tmp_path: Path) -> None:
    """Its two sequences carry the id that is asked for, and say which side they are."""
    chosen, rejected = write(tmp_path / "s", [(pair(1), Place(0, 4, 0))]).unit(0, pair_id=17)
    assert (chosen.pair_id, rejected.pair_id) == (17, 17)
    assert [s.responses[0].origin for s in (chosen, rejected)] == ["a.jsonl:4 (chosen)", "a.jsonl:4 (rejected)"]
    assert [s.responses[0].score for s in (chosen, rejected)] == [1.0, 0.0]


def test_rows_are_told_apart_by_file_and_line(tmp_path: Path) -> None:
    """Units of one row have one number; the same line of another file is another row."""
    sequence = toy_sequences(1)[0]
    places = [Place(0, 1, 1), Place(0, 1, 2), Place(0, 2, 0), Place(1, 2, 0), Place(1, 2, 1), Place(1, 7, 0)]
    store = write(tmp_path / "s", [((sequence,), place) for place in places])
    assert store.rows_U.tolist() == [0, 0, 1, 2, 2, 3]


def test_moved_data_is_named_as_it_is_called_now(tmp_path: Path) -> None:
    """A store made from one place serves the same content elsewhere."""
    write(tmp_path / "s", singles(1))
    assert TokenStore(tmp_path / "s", "label", ("x.jsonl", "y.jsonl")).origin(0) == "x.jsonl:1"


def test_an_empty_store(tmp_path: Path) -> None:
    """A source of which nothing is left makes a store of nothing."""
    store = write(tmp_path / "s", [])
    assert (len(store), store.responses_U.tolist()) == (0, [])
