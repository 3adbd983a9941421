"""Rows to a store: the same whatever the number of processes, one kind a file, bad rows refused or set aside."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forking import forking
from sources import read, rules, write_rows
from suites import long_but
from tiny import build_tiny_tokenizer

from uft_ds.data.example import Example, Message
from uft_ds.data.formats.fields import Row
from uft_ds.data.formats.table import FORMATS
from uft_ds.data.rows.reading import find_data, parse_row, raw_rows
from uft_ds.data.store import building
from uft_ds.data.store.account import ScoresGiven
from uft_ds.data.store.building import QUARANTINE, build_store
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def build(path: Path, chat: ChatTokenizer, *, quarantine: bool = False, workers: int = 1, **changes: Any) -> TokenStore:
    folder = path.parent / f"store-{path.name}-{workers}"
    folder.mkdir()
    build_store(folder, find_data(str(path), None), rules(**changes), chat, quarantine=quarantine, workers=workers)
    return TokenStore(folder, str(path))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that tokenise do not import transformers for seconds first; but for that they are spawned ones."""
    context = forking()
    monkeypatch.setattr(building.multiprocessing, "get_context", lambda method: context)


def refusal(path: Path, chat: ChatTokenizer, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(path, chat, **changes)
    return str(caught.value)


@pytest.mark.parametrize("how", long_but(["forked"], ["forked", "spawned"]))
def test_any_number_of_processes_builds_the_same_store(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, how: str, request: pytest.FixtureRequest
) -> None:
    """Three processes write byte for byte what one does, bad rows, drops and places included."""
    if how == "forked":
        request.getfixturevalue("forked_workers")
    monkeypatch.setattr(building, "_CHUNK_ROWS", 7)
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "response": f"a{i} " * (i % 9 + 1)} for i in range(200)]
    rows[50] |= {"response": ""}
    rows[120] |= {"response": "x<|im_end|>y"}
    rows[150] |= {"prompt": "long " * 200}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, three = (build(path, chat, quarantine=True, workers=workers, max_length=256) for workers in (1, 3))
    for name in ("tokens.bin", "sequences.bin", "units.bin", "responses.bin", "index.json", QUARANTINE):
        assert (one.folder / name).read_bytes() == (three.folder / name).read_bytes()
    assert one.account.rows == 200
    assert one.account.quarantined == 1
    assert one.account.dropped == {"special token in the text": 1, "longer than max_length": 1}
    assert one.places_of("longer than max_length") == (f"{path}:151",)
    assert len(one) == 197


def test_a_bad_row_refuses_the_source_by_its_place(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The first bad row in the order of the file, whichever process found it; file, line, reason, format."""
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "scroe": 1}] * 2
    path = write_rows(tmp_path / "bad.jsonl", rows)
    message = refusal(path, chat)
    assert message.startswith(f"{path}:2: unknown key 'scroe'")
    assert "(format jsonl)" in message
    assert "data.on_bad_row: quarantine" in message


def test_a_bad_row_may_be_set_aside(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Quarantine keeps the good rows, and writes each bad one with place, byte, reason and hash."""
    path = tmp_path / "bad.jsonl"
    good = b'{"prompt": "q", "response": "a"}\n'
    path.write_bytes(good + b'{"prompt": "q", "response": ""}\n' + b'{"prompt": "\xff"}\n' + b"{nonsense\n" + good)
    store = build(path, chat, quarantine=True)
    assert (len(store), store.account.rows, store.account.quarantined) == (2, 5, 3)
    lines = [json.loads(line) for line in (store.folder / QUARANTINE).read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert [line["byte"] for line in lines] == [33, 65, 81]
    assert "'response' is empty" in lines[0]["reason"]
    assert "UTF-8" in lines[1]["reason"]
    assert "JSON" in lines[2]["reason"]
    assert all(len(line["sha256"]) == 64 for line in lines)
    assert lines[2]["row"] == "{nonsense"


def test_rows_of_different_kinds_are_refused_with_both_lines(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A row without score in a scored file would silently become the best answer: both lines and keys are named."""
    rows = [{"prompt": "q", "response": "a", "score": 0.1}] * 3 + [{"prompt": "q", "response": "a"}]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    message = refusal(path, chat)
    assert message.startswith(f"{path}:4: a row of kind 'instruction' with keys prompt, response; {path}:1 is of kind")
    assert "'score' with keys prompt, response, score: the rows of a file must be of one kind" in message
    assert "[keys here" not in message


def test_a_row_of_another_schema_is_refused_with_both_lines(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A preference row among instruction rows: what the format misses, and both rows' keys."""
    rows = [{"prompt": "q", "completion": "a"}, {"question": "q", "answer": "b"}]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    message = refusal(path, chat, format="trl")
    assert message.startswith(f"{path}:2: ")
    assert f"[keys here: answer, question; at {path}:1: completion, prompt]" in message


def test_files_of_one_folder_may_differ_in_kind(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The rule is for each file."""
    write_rows(tmp_path / "data" / "a.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / "b.jsonl", [{"prompt": "q", "response": "a", "score": 0.5}])
    store = build(tmp_path / "data", chat)
    assert [store.unit(i)[0].responses[0].kind for i in range(2)] == ["instruction", "score"]


def test_where_selects_rows(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Rows whose columns have other values are counted, and not looked at."""
    rows = [{"prompt": f"q{i}", "completion": "a", "split": ("train", "val")[i % 2]} for i in range(6)]
    rows[1]["completion"] = ""  # bad, but not selected
    path = write_rows(tmp_path / "rows.jsonl", rows)
    store = build(path, chat, format="trl", where=(("split", "train"),))
    assert (len(store), store.account.skipped, store.account.rows) == (3, 3, 6)


PAIRS = [
    {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 0.9, "score_rejected": 0.2},
    {"prompt": "q", "chosen": "one", "rejected": "other", "score_chosen": 0.5, "score_rejected": 0.5},
]


def test_a_pair_stays_one_unit(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The better side first, kind pair, with the scores of the data; a tie is no preference, dropped and counted."""
    store = build(write_rows(tmp_path / "pairs.jsonl", PAIRS), chat)
    assert len(store) == 1
    assert [(s.responses[0].kind, s.responses[0].score) for s in store.unit(0)] == [("pair", 0.9), ("pair", 0.2)]
    assert store.account.dropped == {"tie": 2}


def test_a_pair_may_become_two_scored_responses(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Split, both sides of both rows are scored responses, the tie's too; without scores in the data, labels."""
    store = build(write_rows(tmp_path / "pairs.jsonl", PAIRS), chat, split_pairs=True)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [("score", 0.9), ("score", 0.2), ("score", 0.5), ("score", 0.5)]
    assert store.account.dropped == {}
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    store = build(bare, chat, split_pairs=True)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [("binary", 1.0), ("binary", 0.0)]


def test_items_of_a_row_are_numbered(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Four completions of one row: four units, each with the row's line and its own number."""
    completions = [{"response": f"r{i}", "overall_score": 1 + 3 * i} for i in range(4)]
    path = write_rows(tmp_path / "uf.jsonl", [{"instruction": "q", "completions": completions}])
    store = build(path, chat, format="ultrafeedback")
    assert [read(store, i).origin for i in range(4)] == [f"{path}:1, item {i + 1}" for i in range(4)]
    assert [read(store, i).score for i in range(4)] == [0.0, 1 / 3, 2 / 3, 1.0]


@pytest.mark.usefixtures("forked_workers")
def test_a_killed_process_is_said(tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenising process that the system kills ends the build with a message, not a hang."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 2)
    monkeypatch.setattr(building, "_start_worker", _die)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}] * 50)
    assert "was killed; out of memory? Set data.workers lower" in refusal(path, chat, workers=2)


def _die(examine: object) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([Example((Message("user", "q"), Message("assistant", "a", 12.25)), "score")], "score of turn 1': found 12.25"),
        ([Example((Message("user", "q"), Message("assistant", "a")), "score")], "scored turns [], expected one"),
        (
            [Example((Message("user", "q", 1.0), Message("assistant", "a")), "score")],
            "turn 0, which is the user's",
        ),
        ([Example((Message("assistant", "a", 1.0),), "score")], "turns must alternate"),
        (["text"], "the format gave str"),
        (None, "format theirs gives NoneType; expected a list of examples or pairs"),
        (Example((Message("user", "q"), Message("assistant", "a", 1.0)), "score"), "format theirs gives Example;"),
        ({"prompt": "q"}, "format theirs gives dict;"),
    ],
)
def test_what_a_plug_in_gives_is_checked(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, items: Any, message: str
) -> None:
    """Another package's format cannot bring a wrong score or a conversation out of order into a run, or crash it."""

    def theirs(row: Row, *, score: float | None) -> Any:
        return items

    monkeypatch.setitem(FORMATS, "theirs", theirs)
    path = write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    found = refusal(path, chat, format="theirs")
    assert found.startswith(f"{path}:1: ")
    assert message in found


def test_pairs_with_scores_and_without_do_not_mix(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A pair that lost its scores would be taken for one scored 1 and 0."""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write_rows(tmp_path / "pairs.jsonl", [pair | {"score_chosen": 0.9, "score_rejected": 0.2}, pair])
    message = refusal(path, chat)
    assert message.startswith(f"{path}:2: a row of kind 'pair' with keys")
    assert f"{path}:1 is of kind 'pair with scores'" in message


def test_where_names_a_column(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A misspelt column would select nothing; the message lists what there is."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a", "split": "train"}])
    message = refusal(path, chat, format="trl", where=(("splti", "train"),))
    assert message == f"{path}: `where` asks for 'splti', which no row has; columns: completion, prompt, split"


def test_columns_are_renamed_and_the_others_counted(tmp_path: Path, chat: ChatTokenizer) -> None:
    """`where` takes the names in the data; what the format does not read is counted by row, and none is lost."""
    rows = [{"question": f"q{i}", "answer": "a", "system": "s", "id": i, "keep": i != 2} for i in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    columns = (("completion", "answer"), ("prompt", "question"), ("system", None))
    store = build(path, chat, format="trl", columns=columns, where=(("keep", True),))
    assert len(store) == 4
    assert store.account.unread == {"id": 4, "keep": 4}


def test_columns_must_be_there(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A name that no row has, and one that the format does not read."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}])
    assert "`columns` asks for 'answr', which no row has; columns: completion, prompt" in refusal(
        path, chat, format="trl", columns=(("label", "answr"),)
    )
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "first")
    assert "`columns` gives 'promt'" in refusal(path, chat, format="trl", columns=(("promt", "prompt"),))
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "second")
    message = refusal(path, chat, format="jsonl", columns=(("response", "answr"),))
    assert "[`columns` asks for answr, which this row does not have]" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completion": "a", "system": "s"}, "rows.jsonl:1: not read by this format: 'system'"),
        ({"prompt": "q", "completion": "a", "score": 0.1}, "'score' (how good the answer is)"),
        ({"question": "q", "chosen": "ab", "rejected": "ac"}, "not read by this format: 'question'"),
    ],
)
def test_columns_that_carry_meaning_refuse_the_row(tmp_path: Path, chat: ChatTokenizer, row: Row, message: str) -> None:
    """Whether the format could make something of the rest or not."""
    path = write_rows(tmp_path / "rows.jsonl", [dict(row)])
    assert message in refusal(path, chat, format="trl")


def test_rows_of_an_array_on_one_line_are_named_by_their_index(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Its line says nothing: in the refusal, in quarantine, in the places of drops and in each response's origin."""
    path = tmp_path / "rows.json"
    rows = [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "response": ""},
        {"prompt": "q", "response": "<|im_end|>"},
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert refusal(path, chat).startswith(f"{path}[1]: 'response' is empty")
    (tmp_path / "store-rows.json-1").rename(tmp_path / "refused")
    store = build(path, chat, quarantine=True)
    entry = json.loads((store.folder / QUARANTINE).read_text())
    assert (entry["place"], entry["byte"]) == (f"{path}[1]", json.dumps(rows).index(json.dumps(rows[1])))
    assert store.places_of("special token in the text") == (f"{path}[2]",)
    assert read(store, 0).origin == f"{path}[0]"


@pytest.mark.usefixtures("forked_workers")
def test_a_refusal_says_how_many_rows_are_bad(
    tmp_path: Path, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read on: to its end, to where it is broken, or for a limited number of rows, which is said."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 10)
    rows = [{"prompt": f"q{i}", "response": "" if i % 50 == 13 else "a"} for i in range(200)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert refusal(path, chat).splitlines() == [
        f"{path}:14: 'response' is empty (format jsonl)",
        f"4 of 200 rows of {path} are bad, the next:",
        f"  {path}:64: 'response' is empty",
        f"  {path}:114: 'response' is empty",
        "correct them, or set data.on_bad_row: quarantine to leave them out (of a source's rows at most the share "
        "data.max_quarantined)",
    ]
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "first")
    assert "\n4 of 200 rows of" in refusal(path, chat, workers=2)  # other processes examine most chunks
    with path.open("a") as file:
        file.write('{"prompt": "q", "resp')
    message = refusal(path, chat)
    assert f"\n4 of the first 190 rows of {path} are bad" in message  # of whole chunks
    assert f"\n{path}:201: the last line is cut off" in message
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "second")
    monkeypatch.setattr(building, "_READ_ON_ROWS", 60)
    message = refusal(path, chat)
    assert f"\n2 of the first 70 rows of {path} are bad" in message
    assert "\nthe rows after them have not been read\n" in message


def test_a_refusal_of_most_rows_asks_for_the_format(tmp_path: Path, chat: ChatTokenizer) -> None:
    """To leave out most rows would hardly be what is meant."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "t"}] * 3)
    assert "these are most of the rows: are they of format jsonl?" in refusal(path, chat)
    assert "quarantine" not in refusal(write_rows(tmp_path / "b.jsonl", [{"text": "t"}] * 3), chat)


def test_a_long_reason_is_written_once(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The other places follow; the reason says what to do, so nothing is added to it."""
    path = write_rows(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(5)])
    assert refusal(path, chat).splitlines() == [
        f"{path}:1: unknown key 'question'; set this source's `columns: {{prompt: question, response: answer}}` "
        "(format jsonl)",
        f"5 of 5 rows of {path} are bad, the next:",
        f"  {path}:2: the same",
        f"  {path}:3: the same",
    ]


@pytest.mark.parametrize(
    "wrong", [{"response": "a", "score": "1.0"}, {"response": "a", "label": 1}, {"response": "a", "scroe": 1.0}]
)
def test_most_rows_of_the_right_format_are_not_asked_for_it(
    tmp_path: Path, chat: ChatTokenizer, wrong: dict[str, Any]
) -> None:
    """A value of another type, or a slip in a key: nothing is to be looked up, and nothing is left out."""
    message = refusal(write_rows(tmp_path / "rows.jsonl", [{"prompt": "q"} | wrong] * 3), chat)
    assert "are they of format" not in message
    assert "quarantine" not in message
    one = [{"prompt": f"q{i}", "response": "a"} for i in range(3)]
    assert "quarantine" in refusal(write_rows(tmp_path / "one.jsonl", [*one, {"prompt": "q"} | wrong]), chat)


def test_rows_of_another_format_are_named(tmp_path: Path, chat: ChatTokenizer) -> None:
    """While no row of the file was good, and only then: after a good one, one row is wrong, not the format."""
    alpaca = {"instruction": "Name a prime.", "input": "", "output": "7"}
    path = write_rows(tmp_path / "alpaca.jsonl", [alpaca, alpaca])
    assert refusal(path, chat).startswith(
        f"{path}:1: keys instruction, input, output: this is format alpaca (read as jsonl: unknown key 'instruction') "
    )
    path = write_rows(tmp_path / "one.jsonl", [{"prompt": "q", "response": "a"}, alpaca])
    assert refusal(path, chat).startswith(f"{path}:2: unknown key 'instruction'")


SCORED = [{"prompt": f"q{i}", "response": "a", "score": i} for i in range(1, 11)]


def test_a_score_range_maps_scores_linearly(tmp_path: Path, chat: ChatTokenizer) -> None:
    """1 to 10: 1 is 0, 10 is 1, 4 is a third; the ends exactly. The lowest and the highest score found are recorded."""
    path = write_rows(tmp_path / "rows.jsonl", SCORED)
    store = build(path, chat, score_range=(1.0, 10.0))
    assert store.responses["score"].tolist() == pytest.approx([(i - 1) / 9 for i in range(1, 11)], abs=1e-15)
    assert (store.responses["score"][0], store.responses["score"][-1]) == (0.0, 1.0)
    assert store.account.scores == ScoresGiven(1.0, 10.0, count=10, outside=0)


def test_scores_outside_their_scale_suggest_a_range(tmp_path: Path, chat: ChatTokenizer) -> None:
    """From the scores of all rows, the good ones too: 1 is from 0 to 1 and yet the lowest."""
    path = write_rows(tmp_path / "rows.jsonl", SCORED)
    message = refusal(path, chat)
    assert message.startswith(f"{path}:2: 'score': found 2, expected a number from 0 to 1")
    assert f"\n9 of 10 rows of {path} are bad" in message
    assert f"\n{path}: 9 of 10 scores outside of its scale; all are from 1 to 10: correct the rows, or," in message
    assert message.endswith("score_range: [1, 10]")
    (tmp_path / "store-rows.jsonl-1").rename(tmp_path / "first")
    message = refusal(path, chat, score_range=(0.0, 5.0))
    assert message.startswith(f"{path}:6: 'score': found 6, expected a number from 0 to 5")
    assert message.endswith("score_range: [1, 10]")


@pytest.mark.parametrize(
    ("scores", "suggested"),
    [
        ([5], "[1, 5]"),
        ([1, 2, 5], "[1, 5]"),
        ([0, 4, 3], "[0, 4]"),
        ([0, 2.5, 5], "[0, 5]"),
        ([1.23456789, 9.87654321], "[1, 10]"),
        ([0.5, 8, 7], "[0, 10]"),
        ([-0.5, 0.5], "[-1, 1]"),
        ([-3.25, 4], "[-10, 10]"),
        ([12, 80.5], "[0, 100]"),
    ],
)
def test_the_suggested_range_is_a_usual_one_that_takes_the_scores(
    tmp_path: Path, chat: ChatTokenizer, scores: list[float], suggested: str
) -> None:
    """The narrowest of them, not the lowest and the highest score that the rows happen to have."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "score": score} for score in scores])
    assert refusal(path, chat).endswith(f"of that scale, as in score_range: {suggested}")


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ([0.1, 0.5, 0.9, 1e9], "{}: 1 of 4 scores outside of its scale; all are from 0.1 to 1000000000:"),
        ([0.1, 0.5, 100], "{}: 1 of 3 scores outside of its scale; all are from 0.1 to 100:"),
        ([0.1, 0.5, -1], "{}: 1 of 3 scores outside of its scale; all are from -1 to 0.5:"),
        ([1, 1234567], "{}: 1 of 2 scores outside of its scale; all are from 1 to 1234567:"),
        ([1234567, 2345678.5], "{}: 2 of 2 scores outside of its scale; all are from 1234567 to 2345678.5:"),
    ],
)
def test_no_range_is_suggested_for_a_slip(tmp_path: Path, chat: ChatTokenizer, scores: list[float], found: str) -> None:
    """A 100 among scores from 0 to 1 is a slip: on a scale up to 100 the others would be next to 0. No scale is
    guessed for scores that no usual one takes."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "score": score} for score in scores])
    message = refusal(path, chat)
    assert found.format(path) in message
    assert message.endswith("set this source's score_range to the lowest and the highest score of that scale")


def test_only_scores_that_are_read_are_recorded(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Of a row with argilla's ratings and other scores beside them, the ratings; the others are not read."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 77, "score_rejected": 66}}
    row |= {"score_chosen": 9, "score_rejected": 7}
    path = write_rows(tmp_path / "scores.jsonl", [row])
    assert build(path, chat, format="ultrafeedback_binarized").account.scores == ScoresGiven(
        7.0, 9.0, count=2, outside=0
    )
    path = write_rows(tmp_path / "ratings.jsonl", [row | {"chosen-rating": 4.5, "rejected-rating": 2}])
    store = build(path, chat, format="ultrafeedback_binarized", score_range=(1.0, 5.0))
    assert store.account.scores == ScoresGiven(2.0, 4.5, count=2, outside=0)


def test_every_format_with_scores_takes_a_range(tmp_path: Path, chat: ChatTokenizer) -> None:
    """It replaces the format's own scale; other formats refuse it, because their scale is part of what they are."""
    ultra = [{"instruction": "q", "completions": [{"response": f"a{s}", "overall_score": s} for s in (0, 0, 3, 4)]}]
    path = write_rows(tmp_path / "ultra.jsonl", ultra)
    assert refusal(path, chat, format="ultrafeedback").endswith("score_range: [0, 4]")
    (tmp_path / "store-ultra.jsonl-1").rename(tmp_path / "first")
    store = build(path, chat, format="ultrafeedback", score_range=(0.0, 4.0))
    assert store.responses["score"].tolist() == [0.0, 0.0, 0.75, 1.0]
    for names in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        row = {"prompt": "q", "chosen": "a", "rejected": "b"} | dict(zip(names, (90, 20), strict=True))
        path = write_rows(tmp_path / f"{names[0]}.jsonl", [row])
        store = build(path, chat, format="ultrafeedback_binarized", score_range=(0.0, 100.0))
        assert store.responses["score"].tolist() == [0.9, 0.2]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,response,stars\nq,a,1\nq,b,4\n", encoding="utf-8")
    store = build(table, chat, score_range=(1.0, 5.0), columns=(("score", "stars"),))
    assert store.responses["score"].tolist() == [0.0, 0.75]
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"], "score": [2.5]}), tmp_path / "rows.parquet")
    assert build(tmp_path / "rows.parquet", chat, score_range=(0.0, 5.0)).responses["score"].tolist() == [0.5]
    for name in sorted(FORMATS.keys() - {"jsonl", "ultrafeedback", "ultrafeedback_binarized"}):
        path = write_rows(tmp_path / f"{name}.jsonl", [{"a": 1}])
        assert f"`score_range` given, but format {name} reads no scores" in refusal(
            path, chat, format=name, score_range=(0.0, 4.0)
        )


MIXED: list[dict[str, Any]] = [
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "response": "b", "score": 0.25},
    {"prompt": "q", "response": "c", "label": False},
    {"prompt": "q", "chosen": "d", "rejected": "e"},
    {"prompt": "q", "chosen": "f", "rejected": "g", "score_chosen": 0.75, "score_rejected": 0.5},
]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_kinds_may_be_mixed_where_the_source_says_so(
    tmp_path: Path, chat: ChatTokenizer, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's own kind counts; without the key the refusal names it."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 2)
    path = write_rows(tmp_path / "mixed.jsonl", MIXED)
    store = build(path, chat, mixed_kinds=True, workers=workers)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [
        ("instruction", 1.0),
        ("score", 0.25),
        ("binary", 0.0),
        ("pair", 1.0),
        ("pair", 0.0),
        ("pair", 0.75),
        ("pair", 0.5),
    ]
    store.folder.rename(tmp_path / "mixed")
    message = refusal(path, chat, workers=workers)
    assert message.startswith(f"{path}:2: a row of kind 'score'")
    assert "or set this source's mixed_kinds: true if that is meant" in message
    assert f"\n4 of 5 rows of {path} are bad" in message


def test_null_members_of_tables_are_absent(tmp_path: Path) -> None:
    """Arrow gives every struct the keys of all others: a call must not be learned with arguments that it lacks."""
    rows = [
        {"messages": [{"role": "user", "content": "q", "extra": {"a": 1}}]},
        {"messages": [{"role": "user", "content": "q", "extra": {"b": 2}}]},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = [parse_row(raw.value) for raw in raw_rows(find_data(str(path), None))]
    assert found == rows


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    """What editors and notebooks leave in a folder would double its rows."""
    write_rows(tmp_path / "data" / "a.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / ".ipynb_checkpoints" / "a-checkpoint.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / ".a.jsonl", [{"prompt": "q", "response": "a"}])
    assert find_data(str(tmp_path / "data"), None).names == (f"{tmp_path}/data/a.jsonl",)
