"""One source from its file to sequences: the count asked for, the same choice every time, nothing lost unsaid."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import build_tiny_tokenizer
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence
from uft_ds.data.prepare import PreparedSource, Source, prepare_source, read_sequences, write_sequences
from uft_ds.data.tokenize import ChatTokenizer, load_tokenizer
from uft_ds.errors import UserError


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty rows of one response each, question i answered by i."""
    return write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(20)])


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Ten conversations of three answers each."""
    return write_rows(tmp_path / "conversations.jsonl", [{"messages": turns(f"{i}.", 3)} for i in range(10)])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(name: str, num_answers: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * num_answers
    return [{"role": role, "content": f"{role[0]}{name}{index}"} for index, role in enumerate(roles)]


def prepare(path: Path | str, chat: ChatTokenizer, format: str = "jsonl", **changes: Any) -> PreparedSource:  # noqa: A002
    source = Source(
        format, str(path), changes.pop("split", None), changes.pop("examples", None), changes.pop("score", None)
    )
    settings = {"max_length": 512, "too_long": "drop", "merge": True, "seed": 0} | changes
    return prepare_source(source, chat, **settings)


def origins(prepared: PreparedSource) -> list[str]:
    """Where each response came from, without the folder."""
    return [Path(r.origin).name for sequence in prepared.sequences for r in sequence.responses]


def refusal(path: Path | str, chat: ChatTokenizer, format: str = "jsonl", **changes: Any) -> str:  # noqa: A002
    with pytest.raises(UserError) as caught:
        prepare(path, chat, format, **changes)
    return str(caught.value)


def test_without_examples_all_rows_come_in_their_order(pairs: Path, chat: ChatTokenizer) -> None:
    """Every row once, in the order of the file, each response with file and line."""
    prepared = prepare(pairs, chat)
    assert origins(prepared) == [f"pairs.jsonl:{line}" for line in range(1, 21)]
    assert (prepared.num_responses, prepared.dropped, prepared.label) == (20, {}, str(pairs))
    assert prepared.num_tokens == sum(len(sequence.token_ids_T) for sequence in prepared.sequences)


@pytest.mark.parametrize("examples", [1, 7, 20])
def test_examples_counts_rows_of_one_response(pairs: Path, chat: ChatTokenizer, examples: int) -> None:
    """As many responses as asked for, none twice."""
    chosen = origins(prepare(pairs, chat, examples=examples))
    assert len(chosen) == len(set(chosen)) == examples


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("examples", [1, 2, 3, 4, 16, 29, 30])
def test_examples_counts_responses_exactly(
    conversations: Path, chat: ChatTokenizer, examples: int, merge: bool
) -> None:
    """The last conversation is cut after the last response that was asked for; merging chooses the same ones."""
    prepared = prepare(conversations, chat, "ultrachat", examples=examples, merge=merge)
    assert prepared.num_responses == examples
    assert len(prepared.sequences) == (-(-examples // 3) if merge else examples)
    assert all(sequence.num_tokens == sequence.responses[-1].end for sequence in prepared.sequences)
    assert origins(prepared) == origins(prepare(conversations, chat, "ultrachat", examples=examples, merge=not merge))


def test_the_choice_depends_on_the_seed_alone(pairs: Path, chat: ChatTokenizer) -> None:
    """The same seed draws the same rows in the same order; another seed others."""
    first, again, other = (origins(prepare(pairs, chat, examples=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_more_examples_keep_those_already_chosen(pairs: Path, chat: ChatTokenizer) -> None:
    """A smaller share is the beginning of a larger one, so that shares can be compared."""
    few, many = (origins(prepare(pairs, chat, examples=n)) for n in (5, 12))
    assert many[:5] == few


def test_moved_data_gives_the_same_choice(pairs: Path, chat: ChatTokenizer, tmp_path: Path) -> None:
    """The draw knows the file's name, not the folder that it lies in on this machine."""
    elsewhere = tmp_path / "elsewhere" / pairs.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(pairs.read_bytes())
    assert origins(prepare(elsewhere, chat, examples=8)) == origins(prepare(pairs, chat, examples=8))


def test_only_the_rows_needed_are_tokenised(pairs: Path, chat: ChatTokenizer) -> None:
    """Three examples of rows of one response visit three rows, reported with the total."""
    visits: list[tuple[int, int]] = []
    prepare(pairs, chat, examples=3, on_row=lambda done, total: visits.append((done, total)))
    assert visits == [(1, 20), (2, 20), (3, 20)]


def test_the_sources_score_reaches_the_responses(pairs: Path, chat: ChatTokenizer) -> None:
    """The recipe's constant stands for rows without a score."""
    assert {r.score for s in prepare(pairs, chat, score=0.25).sequences for r in s.responses} == {0.25}


def test_a_split_chooses_files_and_labels_the_source(pairs: Path, chat: ChatTokenizer) -> None:
    """The label of a source names its split."""
    prepared = prepare(pairs.parent, chat, split="pairs")
    assert (prepared.num_responses, prepared.label) == (20, f"{pairs.parent}[pairs]")


def test_too_few_rows_are_refused_with_counts(pairs: Path, chat: ChatTokenizer) -> None:
    """The message says how many were asked for and how many there are."""
    message = refusal(pairs, chat, examples=21)
    assert message.startswith(
        f"{pairs}: 21 examples asked for, but its 20 rows give only 20 responses; lower `examples`"
    )


def test_too_few_after_drops_are_refused_with_reasons(pairs: Path, chat: ChatTokenizer) -> None:
    """What was left out, how often and where it began is part of the message."""
    rows = [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "response": "<|im_end|>"},
        {"prompt": "q" * 600, "response": "a"},
    ]
    path = write_rows(pairs.with_name("mixed.jsonl"), rows)
    message = refusal(path, chat, examples=2)
    assert "its 3 rows give only 1 responses" in message
    assert f"1 special token in the text (first: {path}:2)" in message
    assert f"1 longer than max_length (first: {path}:3)" in message


def test_a_source_of_which_all_is_dropped_is_refused(pairs: Path, chat: ChatTokenizer) -> None:
    """Reason, count and the first three places."""
    message = refusal(pairs, chat, max_length=12)
    places = ", ".join(f"{pairs}:{line}" for line in (1, 2, 3))
    assert message == (
        f"{pairs}: none of 20 rows gives a usable response; left out: 20 longer than max_length (first: {places})"
    )


def test_drops_are_counted_by_response(conversations: Path, chat: ChatTokenizer) -> None:
    """Ten conversations that fit up to the first of their three answers lose two answers each."""
    (first_end,) = {s.responses[0].end for s in prepare(conversations, chat, "ultrachat").sequences}
    prepared = prepare(conversations, chat, "ultrachat", max_length=first_end)
    assert (prepared.num_responses, prepared.dropped) == (10, {"longer than max_length": 20})
    assert [Path(o).name for o in prepared.dropped_origins["longer than max_length"]] == [
        f"conversations.jsonl:{line}" for line in (1, 2, 3)
    ]


def test_dropped_responses_are_replaced(pairs: Path, chat: ChatTokenizer) -> None:
    """`examples` counts what is kept: rows that are dropped do not use it up."""
    rows = [{"prompt": "q", "response": "<|im_end|>" if i % 2 else "a"} for i in range(20)]
    prepared = prepare(write_rows(pairs.with_name("half.jsonl"), rows), chat, examples=10)
    assert prepared.num_responses == 10


@pytest.mark.parametrize("examples", [None, 3])
def test_a_bad_row_is_refused_by_file_and_line(pairs: Path, chat: ChatTokenizer, examples: int | None) -> None:
    """The message names file and line, what is wrong, and the format that was expected."""
    path = write_rows(pairs.with_name("bad.jsonl"), [{"prompt": "q", "response": "a"}, {"prompt": "q", "scroe": 1}] * 2)
    message = refusal(path, chat, examples=examples)
    assert message.startswith((f"{path}:2: unknown key 'scroe'", f"{path}:4: unknown key 'scroe'"))
    assert message.endswith("(format jsonl)")


def test_too_long_refuse(pairs: Path, chat: ChatTokenizer) -> None:
    """With `too_long: refuse` the first response that does not fit ends the run, by its place."""
    assert prepare(pairs, chat, too_long="refuse").num_responses == 20
    message = refusal(pairs, chat, too_long="refuse", max_length=12)
    assert message.startswith(
        f"{pairs}:1: a response ends past data.max_length 12; raise it, or set data.too_long: drop"
    )


def test_sequences_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Tokens, spans, scores to the last bit, kinds and origins survive the file; a score of a third shows rounding."""
    odd = Sequence(np.array([5, 2**31 - 1, 0], dtype=np.int32), (Response(1, 3, 1 / 3, "pair", "f é\u2028:1"),))
    written = (*toy_sequences(30), odd, Sequence(np.zeros(2, dtype=np.int32), ()))
    write_sequences(tmp_path / "data.arrow", written)
    read = read_sequences(tmp_path / "data.arrow")
    assert [s.token_ids_T.tolist() for s in read] == [s.token_ids_T.tolist() for s in written]
    assert [s.responses for s in read] == [s.responses for s in written]
    assert {s.token_ids_T.dtype for s in read} == {np.dtype("int32")}


def test_no_sequences_are_a_valid_file(tmp_path: Path) -> None:
    """A run without held-out data writes an empty file."""
    write_sequences(tmp_path / "data.arrow", ())
    assert read_sequences(tmp_path / "data.arrow") == ()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """An error on the way neither leaves half a file nor touches the one that was there."""
    path = tmp_path / "data.arrow"

    def interrupted() -> Iterator[Sequence]:
        yield from toy_sequences(3)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_sequences(path, interrupted())
    assert list(tmp_path.iterdir()) == []
    write_sequences(path, toy_sequences(2))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk gone"):
        write_sequences(path, interrupted())
    assert [file.name for file in tmp_path.iterdir()] == ["data.arrow"]
    assert path.read_bytes() == before
