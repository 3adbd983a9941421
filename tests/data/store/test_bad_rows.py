"""Bad rows are refused by their places, with what was expected, or set aside."""

import json
from pathlib import Path
from typing import Any

import pytest
from sources import read, write_rows
from stores import build, refusal

from uft_ds.data.example import Example, Message
from uft_ds.data.formats.fields import Row
from uft_ds.data.formats.table import FORMATS
from uft_ds.data.store.building import QUARANTINE
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


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


def test_rows_of_different_kinds_are_refused_with_both_lines(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A row without score in a scored file would silently become the best answer: both lines and keys are named."""
    rows = [{"prompt": "q", "response": "a", "score": 0.1}] * 3 + [{"prompt": "q", "response": "a"}]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    message = refusal(path, chat)
    assert message.startswith(f"{path}:4: a row of kind 'instruction' with keys prompt, response; {path}:1 is of kind")
    assert "'score' with keys prompt, response, score: the rows of a file must be of one kind" in message
    assert "[keys here" not in message


def test_pairs_with_scores_and_without_do_not_mix(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A pair that lost its scores would be taken for one scored 1 and 0."""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write_rows(tmp_path / "pairs.jsonl", [pair | {"score_chosen": 0.9, "score_rejected": 0.2}, pair])
    message = refusal(path, chat)
    assert message.startswith(f"{path}:2: a row of kind 'pair' with keys")
    assert f"{path}:1 is of kind 'pair with scores'" in message


def test_a_row_of_another_schema_is_refused_with_both_lines(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A preference row among instruction rows: what the format misses, and both rows' keys."""
    rows = [{"prompt": "q", "completion": "a"}, {"question": "q", "answer": "b"}]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    message = refusal(path, chat, format="trl")
    assert message.startswith(f"{path}:2: ")
    assert f"[keys here: answer, question; at {path}:1: completion, prompt]" in message


def test_rows_of_another_format_are_named(tmp_path: Path, chat: ChatTokenizer) -> None:
    """While no row of the file was good, and only then: after a good one, one row is wrong, not the format."""
    alpaca = {"instruction": "Name a prime.", "input": "", "output": "7"}
    path = write_rows(tmp_path / "alpaca.jsonl", [alpaca, alpaca])
    assert refusal(path, chat).startswith(
        f"{path}:1: keys instruction, input, output: this is format alpaca (read as jsonl: unknown key 'instruction') "
    )
    path = write_rows(tmp_path / "one.jsonl", [{"prompt": "q", "response": "a"}, alpaca])
    assert refusal(path, chat).startswith(f"{path}:2: unknown key 'instruction'")


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


def test_where_names_a_column(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A misspelt column would select nothing; the message lists what there is."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a", "split": "train"}])
    message = refusal(path, chat, format="trl", where=(("splti", "train"),))
    assert message == f"{path}: `where` asks for 'splti', which no row has; columns: completion, prompt, split"


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
