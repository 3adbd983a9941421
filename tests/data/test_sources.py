"""One source from its file to sequences: the count asked for, the same choice every time, nothing lost unsaid."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from sources import rules, write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.example import Sequence
from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.store.building import RowRules
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


CACHE: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for all tests of this file: stores are known by content."""
    CACHE[:] = [tmp_path_factory.mktemp("cache")]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty rows of one response each, question i answered by i."""
    return write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(20)])


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Ten conversations of three answers each."""
    return write_rows(tmp_path / "conversations.jsonl", [{"messages": turns(f"{i}.", 3)} for i in range(10)])


def turns(name: str, num_answers: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * num_answers
    return [{"role": role, "content": f"{role[0]}{name}{index}"} for index, role in enumerate(roles)]


def prepare(path: Path | str, chat: ChatTokenizer, format: str = "jsonl", **changes: Any) -> PreparedSource:  # noqa: A002
    keys = {f.name for f in fields(RowRules)}
    own = rules(format=format, **{key: changes.pop(key) for key in list(changes) if key in keys})
    draw = {key: changes.pop(key) for key in ("examples", "portion", "allow_one_score") if key in changes}
    source = SourceSettings(str(path), changes.pop("split", None), own, **draw)
    seed = changes.pop("seed", 0)
    return prepare_source(source, chat, CACHE[0], seed=seed, tolerance=Tolerance(**changes))


def sequences(prepared: PreparedSource) -> list[Sequence]:
    selection = prepared.selection
    return [sequence for index in range(len(selection)) for sequence in selection.unit(index)]


def origins(prepared: PreparedSource) -> list[str]:
    """Where each response came from, without the folder."""
    return [Path(r.origin).name for sequence in sequences(prepared) for r in sequence.responses]


def refusal(path: Path | str, chat: ChatTokenizer, format: str = "jsonl", **changes: Any) -> str:  # noqa: A002
    with pytest.raises(UserError) as caught:
        prepare(path, chat, format, **changes)
    return str(caught.value)


def test_without_examples_all_rows_come_in_their_order(pairs: Path, chat: ChatTokenizer) -> None:
    """Every row once, in the order of the file, each response with file and line."""
    prepared = prepare(pairs, chat)
    assert origins(prepared) == [f"pairs.jsonl:{line}" for line in range(1, 21)]
    found = (prepared.selection.num_responses, prepared.account.dropped, prepared.label)
    assert found == (20, {}, str(pairs))
    assert prepared.selection.num_tokens == sum(len(sequence.token_ids_T) for sequence in sequences(prepared))


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
    assert prepared.selection.num_responses == examples
    assert len(sequences(prepared)) == (-(-examples // 3) if merge else examples)
    assert all(sequence.num_tokens == sequence.responses[-1].end for sequence in sequences(prepared))
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


def test_the_sources_score_reaches_the_responses(pairs: Path, chat: ChatTokenizer) -> None:
    """The recipe's constant stands for rows without a score."""
    assert {r.score for s in sequences(prepare(pairs, chat, score=0.25)) for r in s.responses} == {0.25}


def test_a_split_chooses_files_and_labels_the_source(pairs: Path, chat: ChatTokenizer) -> None:
    """The label of a source names its split."""
    prepared = prepare(pairs.parent, chat, split="pairs")
    assert (prepared.selection.num_responses, prepared.label) == (20, f"{pairs.parent}[pairs]")


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
    (first_end,) = {s.responses[0].end for s in sequences(prepare(conversations, chat, "ultrachat"))}
    prepared = prepare(conversations, chat, "ultrachat", max_length=first_end)
    assert (prepared.selection.num_responses, prepared.account.dropped) == (10, {"longer than max_length": 20})
    assert [Path(o).name for o in prepared.selection.store.places_of("longer than max_length")] == [
        f"conversations.jsonl:{line}" for line in (1, 2, 3)
    ]


def test_dropped_responses_are_replaced(pairs: Path, chat: ChatTokenizer) -> None:
    """`examples` counts what is kept: rows that are dropped do not use it up."""
    rows = [{"prompt": "q", "response": "<|im_end|>" if i % 2 else "a"} for i in range(20)]
    prepared = prepare(write_rows(pairs.with_name("half.jsonl"), rows), chat, examples=10)
    assert prepared.selection.num_responses == 10


def test_too_long_refuse(pairs: Path, chat: ChatTokenizer) -> None:
    """With `too_long: refuse` a response that does not fit ends the run, by its place."""
    assert prepare(pairs, chat, long_responses=False).selection.num_responses == 20
    message = refusal(pairs, chat, long_responses=False, max_length=12)
    assert message.startswith(f"{pairs}:1: a response ends past data.max_length 12 (20 do in {pairs}); raise it, or")
    assert "data.too_long: drop or trim_prompt" in message


def test_a_trimmed_prompt_is_kept_and_counted(pairs: Path, chat: ChatTokenizer) -> None:
    """With `trim_prompt` the response that was too long is there, with the end of its prompt."""
    rows = [{"prompt": "x" * 600 + f" end {i}", "response": "a"} for i in range(3)]
    path = write_rows(pairs.with_name("long.jsonl"), rows)
    prepared = prepare(path, chat, max_length=100, trim_prompt=True)
    assert prepared.selection.num_responses == 3
    assert prepared.account.changed == {"prompt trimmed to max_length": 3}
    assert all(90 < sequence.num_tokens <= 100 for sequence in sequences(prepared))


def test_quarantine_is_accepted_up_to_a_share(pairs: Path, chat: ChatTokenizer) -> None:
    """One bad row of twenty is 5%: accepted by a tenth, refused by a hundredth, and where nothing may be bad."""
    rows = [{"prompt": f"q{i}", "response": "a" if i else ""} for i in range(20)]
    path = write_rows(pairs.with_name("bad.jsonl"), rows)
    assert refusal(path, chat).startswith(f"{path}:1: 'response' is empty")
    assert prepare(path, chat, quarantine=True, max_quarantined=0.1).selection.num_responses == 19
    message = refusal(path, chat, quarantine=True, max_quarantined=0.01)
    assert message.startswith(
        f"{path}: 1 of 20 rows are bad, more than data.max_quarantined 0.01 allows; each is named"
    )
    assert message.endswith(f"; the first:\n  {path}:1: 'response' is empty")
    assert refusal(path, chat).startswith(f"{path}:1: 'response' is empty (1 of 20 rows of {path} are bad, all in ")


@pytest.mark.parametrize("key", ["score", "label"])
def test_feedback_of_one_score_is_refused(pairs: Path, chat: ChatTokenizer, key: str) -> None:
    """Twenty responses of one score or label teach nothing: refused, unless it is said to be meant."""
    rows = [{"prompt": f"q{i}", "response": "a", key: 0.5 if key == "score" else True} for i in range(20)]
    path = write_rows(pairs.with_name(f"{key}.jsonl"), rows)
    kind = {"label": "binary"}.get(key, key)
    assert f"all 20 responses of kind '{kind}' have the score" in refusal(path, chat)
    other, values = ("label", [False, True]) if key == "score" else ("score", [0.0, 1.0])
    others = [{"prompt": "q", "response": "b", other: value} for value in values]
    mixed = write_rows(pairs.with_name(f"mixed-{key}.jsonl"), rows + others)
    assert "all 20 responses of kind" in refusal(mixed, chat, mixed_kinds=True)  # other kinds do not hide it
    assert prepare(path, chat, allow_one_score=True).selection.num_responses == 20
    assert prepare(write_rows(path, rows[:19]), chat).selection.num_responses == 19


@pytest.mark.parametrize(("examples", "expected"), [(1, 2), (2, 2), (3, 4)])
def test_pairs_are_drawn_whole(pairs: Path, chat: ChatTokenizer, examples: int, expected: int) -> None:
    """An odd number of examples takes one more: a pair is not torn."""
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    prepared = prepare(write_rows(pairs.with_name("p.jsonl"), rows), chat, examples=examples)
    assert prepared.selection.num_responses == len(sequences(prepared)) == expected
