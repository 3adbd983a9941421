"""Stores: what was written comes back, from the disk, by index; a damaged one is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence, Unit
from uft_ds.data.store.sequences import (
    INDEX,
    Account,
    Place,
    Selection,
    StoreWriter,
    TokenStore,
    check_content,
    pack_units,
    write_sample,
)
from uft_ds.errors import UserError

ACCOUNT = Account(9, {"tie": 2}, {"trimmed": 1}, {"tie": [[0, 1], [1, 3]]}, 1, 0)


def pair(number: int) -> Unit:
    sides = (np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32) + number)
    return tuple(
        Sequence(tokens, (Response(2, len(tokens), float(1 - i), "pair", "", 0),)) for i, tokens in enumerate(sides)
    )


def write(folder: Path, *chunks: list[tuple[Unit, Place]]) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder)
    for chunk in chunks:
        writer.add(pack_units(chunk))
    writer.finish(("a.jsonl", "b.jsonl"), ACCOUNT)
    return TokenStore(folder, "label")


def singles(count: int, file: int = 0) -> list[tuple[Unit, Place]]:
    return [((sequence,), Place(file, i + 1, 0)) for i, sequence in enumerate(toy_sequences(count))]


def test_a_fact_that_a_store_cannot_hold_is_refused() -> None:
    """Nothing but scores is stored: another fact is not lost without an error."""
    response = Response(1, 2, 0.5, "score", other_facts={"advantage": 1.0})
    unit = (Sequence(np.arange(2, dtype=np.int32), (response,)),)
    with pytest.raises(ValueError, match="advantage would be lost"):
        pack_units([(unit, Place(0, 1, 0))])


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


@pytest.mark.parametrize("name", ["tokens", "sequences", "units", "responses"])
def test_a_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    """A file shorter than the index says, or missing, is named, with the remedy."""
    write(tmp_path / "s", singles(3))
    path = tmp_path / "s" / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}\.bin: \d+ bytes, expected \d+; delete .*built again"):
        TokenStore(tmp_path / "s", "label")
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.bin: 0 bytes, expected"):
        TokenStore(tmp_path / "s", "label")


@pytest.mark.parametrize("name", ["tokens", "sequences", "units", "responses"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    """Sizes stay the same, so opening the store does not see it: what trains on it reads it through once."""
    folder = tmp_path / "s"
    write(folder, singles(2), [(pair(1), Place(0, 9, 0))])
    check_content(folder)
    path = folder / f"{name}.bin"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        TokenStore(folder, "label")
        with pytest.raises(UserError, match=rf"{name}\.bin: its content is not what was written.*built again"):
            check_content(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.bin: cannot be read"):
        check_content(folder)


def test_a_store_without_hashes_is_of_an_older_version(tmp_path: Path) -> None:
    """It cannot be compared with anything; a run that began with it goes on."""
    write(tmp_path, singles(2))
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    check_content(tmp_path)


def test_the_index_is_written_last(tmp_path: Path) -> None:
    """A writer that has not finished leaves no index, so that nobody takes the folder for a store."""
    writer = StoreWriter(tmp_path)
    writer.add(pack_units(singles(3)))
    writer.close()
    assert not (tmp_path / INDEX).exists()


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
