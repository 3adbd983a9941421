"""Scoring a data set: what is written, what is resumed, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from uft_ds.data.formats.jsonl import jsonl
from uft_ds.errors import CheckFailed, UserError
from uft_ds.scoring.item import Item, Judgement, Tokens, failed, found
from uft_ds.scoring.record import Record
from uft_ds.scoring.rows import Reading, Rows
from uft_ds.scoring.run import Outcome, Target, score_data

SINGLE = [{"prompt": f"p{number}", "response": "r" * (number + 1), "meta": {"n": number}} for number in range(10)]
PAIRS = [
    {"prompt": "p", "chosen": "longer", "rejected": "short"},
    {"prompt": "q", "chosen": "s", "rejected": "longer"},
    {"prompt": "r", "chosen": "same", "rejected": "Same"},
]


class Lengths:
    """A tenth of an answer's length, with faults. asked: all answers that it was given."""

    batch_items = 3

    def __init__(self, fault: Callable[[Item], Judgement | None] = lambda item: None, name: str = "lengths") -> None:
        self._fault, self._name = fault, name
        self.asked: list[str] = []

    def identity(self) -> Mapping[str, Any]:
        return {"scorer": self._name}

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        self.asked += [item.response for item in items]
        return [self._fault(item) or found(len(item.response) / 10, notes=("seen",)) for item in items]

    def close(self) -> None:
        pass


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, rows: Sequence[Any], scorer: Lengths, *, retry: bool = False, **target: Any) -> Outcome:
    data = write(folder / "rows.jsonl", rows)
    values = {"out": folder / "out.jsonl", "rule": "affine:0,1"} | target
    named, share = values.pop("format", "jsonl"), values.pop("max_quarantined", None)
    return score_data(
        Rows(Reading(str(data), named, max_quarantined=share)), scorer, Target(**values), retry_failures=retry
    )


def test_each_answer_gets_its_score(tmp_path: Path) -> None:
    """In the order of the rows, in our own format, with the raw value and the scorer beside what meta held."""
    outcome = run(tmp_path, SINGLE, Lengths(), rule="affine:0,2")
    assert outcome.is_written
    rows = read(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in SINGLE]
    assert [row["score"] for row in rows] == pytest.approx([(number + 1) / 20 for number in range(10)])
    assert rows[3]["meta"] == {
        "n": 3,
        "scoring": {"scorer": rows[0]["meta"]["scoring"]["scorer"], "map": "affine:0,2", "raw": 0.4},
    }
    assert (outcome.summary.answers, outcome.summary.scored, outcome.summary.failed) == (10, 10, 0)
    for row in rows:
        jsonl(row, score=None)


def test_the_better_side_of_a_pair_is_chosen(tmp_path: Path) -> None:
    """By its new scores; a tie stays in its order."""
    run(tmp_path, PAIRS, Lengths())
    rows = read(tmp_path / "out.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("longer", "short"),
        ("longer", "s"),
        ("same", "Same"),
    ]
    assert [(row["score_chosen"], row["score_rejected"]) for row in rows] == [(0.6, 0.5), (0.6, 0.1), (0.4, 0.4)]
    assert [row["meta"]["scoring"]["swapped"] for row in rows] == [False, True, False]
    assert rows[1]["meta"]["scoring"]["raw"] == [0.6, 0.1]


def test_a_pair_can_be_written_as_two_rows(tmp_path: Path) -> None:
    """Each side a scored answer."""
    run(tmp_path, PAIRS, Lengths(), split_pairs=True)
    rows = read(tmp_path / "out.jsonl")
    assert [(row["response"], row["score"]) for row in rows[:2]] == [("longer", 0.6), ("short", 0.5)]
    assert len(rows) == 6


def test_scores_and_labels_of_the_data_are_kept(tmp_path: Path) -> None:
    """As `given`, from 0 to 1, for a calibration."""
    rows = [
        {"prompt": "p", "response": "a", "score": 0.7},
        {"prompt": "p", "response": "b", "label": False},
        {"prompt": "p", "chosen": "a", "rejected": "bb", "score_chosen": 0.9, "score_rejected": 0.2},
    ]
    run(tmp_path, rows, Lengths())
    assert [row["meta"]["scoring"]["given"] for row in read(tmp_path / "out.jsonl")] == [0.7, 0.0, [0.2, 0.9]]


def test_every_answer_of_a_row_is_scored(tmp_path: Path) -> None:
    """UltraFeedback's completions, and the assistant's turns of a conversation, each after those before it."""
    completions = [{"response": text, "overall_score": 5.0} for text in ("a", "bbb", "cc")]
    run(
        tmp_path, [{"instruction": "p", "completions": completions, "source": "web"}], Lengths(), format="ultrafeedback"
    )
    rows = read(tmp_path / "out.jsonl")
    assert [(row["response"], row["score"]) for row in rows] == [("a", 0.1), ("bbb", 0.3), ("cc", 0.2)]
    assert rows[0]["meta"]["source"] == "web"
    folder = tmp_path / "turns"
    folder.mkdir()
    said = ["q", "a", "q2", "a2"]
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(said)]
    run(folder, [{"messages": turns}], Lengths())
    first, second = read(folder / "out.jsonl")
    assert (first["prompt"], first["response"]) == ("q", "a")
    assert ([turn["content"] for turn in second["messages"]], second["response"]) == (said[:3], "a2")


def test_what_failed_is_left_out_and_listed(tmp_path: Path) -> None:
    """With its place and reason; a pair goes with either of its sides. Values outside of the map fail, too."""
    scorer = Lengths(lambda item: failed("no idea") if item.response in ("rr", "short") else None)
    outcome = run(tmp_path, [*SINGLE, PAIRS[0]], scorer, rule="affine:0,0.9", max_failures=0.5)
    assert outcome.is_written
    assert len(read(tmp_path / "out.jsonl")) == 8
    failures = read(tmp_path / "out.jsonl.scoring" / "failures.jsonl")
    data = tmp_path / "rows.jsonl"
    assert [(one["place"], one["reason"].partition(" (")[0]) for one in failures] == [
        (f"{data}:2", "no idea"),
        (f"{data}:10", "the raw score 1 is not from 0 to 0.9"),
        (f"{data}:11 answer 1", "the other answer of the pair has no score"),
        (f"{data}:11 answer 2", "no idea"),
    ]
    assert (outcome.summary.answers, outcome.summary.failed) == (12, 4)
    assert outcome.summary.reasons["no idea"] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_a_failure(value: float, tmp_path: Path) -> None:
    """Under any rule."""
    outcome = run(tmp_path, SINGLE, Lengths(lambda item: found(value)), rule="sigmoid")
    assert not outcome.is_written
    assert outcome.summary.failed == 10
    assert not (tmp_path / "out.jsonl").exists()


def test_a_reason_with_half_a_character_is_listed(tmp_path: Path) -> None:
    """As an escape: an exception or a judge's reply may hold what no encoding can."""
    scorer = Lengths(lambda item: failed("half \ud800") if item.response == "r" else None)
    assert run(tmp_path, SINGLE, scorer).is_written
    (listed,) = read(tmp_path / "out.jsonl.scoring" / "failures.jsonl")
    assert listed["reason"] == "half \ud800"


def test_too_many_failures_leave_no_output_and_are_asked_again(tmp_path: Path) -> None:
    """2 of 10 with 1 of 10 tolerated; the second run asks for these two alone."""
    scorer = Lengths(lambda item: failed("down") if len(item.response) < 3 else None)
    assert not run(tmp_path, SINGLE, scorer).is_written
    assert not (tmp_path / "out.jsonl").exists()
    again = Lengths()
    outcome = run(tmp_path, SINGLE, again)
    assert again.asked == ["r", "rr"]
    assert outcome.is_written
    assert len(read(tmp_path / "out.jsonl")) == 10


def test_a_hopeless_run_ends_early(tmp_path: Path) -> None:
    """After 20 failures that are more than what is tolerated of all."""
    rows = [{"prompt": "p", "response": f"r{number}"} for number in range(300)]
    scorer = Lengths(lambda item: failed("down"))
    outcome = run(tmp_path, rows, scorer, max_failures=0.05)
    assert not outcome.is_written
    assert 20 <= len(scorer.asked) <= 23


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(1, 10))
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    """Wherever it was cut off, in the middle of a line of its record, too; nothing that was kept is asked again."""
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, SINGLE, Lengths(), rule="quantile")

    def cut(item: Item) -> Judgement | None:
        if len(item.response) == after:
            raise Killed
        return None

    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(Killed):
        run(folder, SINGLE, Lengths(cut), rule="quantile")
    log = folder / "out.jsonl.scoring" / "judgements.jsonl"
    kept = (after - 1) // 3 * 3
    if kept:
        log.write_bytes(log.read_bytes()[:-7])
        kept -= 1
    assert not (folder / "out.jsonl").exists()
    again = Lengths()
    outcome = run(folder, SINGLE, again, rule="quantile")
    assert outcome.is_written
    assert len(again.asked) == 10 - kept
    assert (folder / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    run(folder, SINGLE, again, rule="affine:0,1")  # the record is whole again
    assert len(again.asked) == 10 - kept


def test_a_kill_after_the_output_was_renamed_does_no_harm(tmp_path: Path) -> None:
    """The summary that marks it as complete is missing: it is written again, to the same bytes."""
    run(tmp_path, SINGLE, Lengths())
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.scoring" / "summary.json").unlink()
    again = Lengths()
    assert not run(tmp_path, SINGLE, again).was_complete
    assert again.asked == []
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_kill_while_another_map_is_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is the new one, and the summary of the old one must not say that a user has changed it."""
    run(tmp_path, SINGLE, Lengths())

    def die(record: Record, summary: Mapping[str, Any]) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Record, "finish", die)
        with pytest.raises(Killed):
            run(tmp_path, SINGLE, Lengths(), rule="affine:0,2")
    assert run(tmp_path, SINGLE, Lengths(), rule="affine:0,2").is_written
    assert read(tmp_path / "out.jsonl")[0]["score"] == 0.05


def test_a_complete_output_is_not_scored_again(tmp_path: Path) -> None:
    """Not even what has failed, unless that is asked for."""
    scorer = Lengths(lambda item: failed("down") if item.response == "r" else None)
    first = run(tmp_path, SINGLE, scorer)
    assert first.is_written
    again = Lengths()
    outcome = run(tmp_path, SINGLE, again)
    assert (outcome.was_complete, again.asked) == (True, [])
    assert outcome.summary == first.summary
    run(tmp_path, SINGLE, again, retry=True)
    assert again.asked == ["r"]
    assert len(read(tmp_path / "out.jsonl")) == 10


def test_a_complete_output_with_more_failures_than_are_tolerated_now_is_not_done(tmp_path: Path) -> None:
    """Those that failed are asked again; if they fail again, the command fails and the output stays as it is."""
    fails = Lengths(lambda item: failed("down") if item.response == "r" else None)
    assert run(tmp_path, SINGLE, fails).is_written
    before = (tmp_path / "out.jsonl").read_bytes()
    outcome = run(tmp_path, SINGLE, fails, max_failures=0.05)
    assert (outcome.is_written, outcome.was_complete, fails.asked.count("r")) == (False, False, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run(tmp_path, SINGLE, Lengths(), max_failures=0.05).is_written
    assert len(read(tmp_path / "out.jsonl")) == 10


def test_another_map_or_limit_asks_for_what_is_missing_alone(tmp_path: Path) -> None:
    """The judgements stay, the output is written anew."""
    scorer = Lengths()
    run(tmp_path, SINGLE, scorer, limit=4)
    assert len(read(tmp_path / "out.jsonl")) == 4
    run(tmp_path, SINGLE, scorer, rule="affine:0,2")
    assert len(scorer.asked) == 10
    assert [row["score"] for row in read(tmp_path / "out.jsonl")][:2] == [0.05, 0.1]


def test_another_content_of_a_calibrations_file_is_another_map(tmp_path: Path) -> None:
    """The same command gives the scores of the file as it is now; an unchanged file leaves the output as it is."""
    file = tmp_path / "labelled.jsonl"
    for target, was_complete in ((1.0, False), (1.0, True), (0.5, False)):
        write(file, [{"raw": 0, "target": 0}, {"raw": 1, "target": target}])
        assert run(tmp_path, SINGLE, Lengths(), rule=f"isotonic:{file}").was_complete is was_complete
        assert read(tmp_path / "out.jsonl")[0]["score"] == pytest.approx(0.1 * target)


def test_a_lower_limit_counts_its_own_rows_alone(tmp_path: Path) -> None:
    """Of the rows beyond it, which are scored, neither notes nor quantiles are left in the summary."""
    for limit, seen in ((None, 10), (4, 4)):
        outcome = run(tmp_path, SINGLE, Lengths(), limit=limit, rule="quantile")
        assert (outcome.summary.answers, outcome.summary.notes) == (seen, {"seen": seen})
        assert outcome.summary.mean == pytest.approx(0.5)


def test_rows_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    """Nothing is written: scores of one text would stand beside another."""

    def change(item: Item) -> Judgement | None:
        write(tmp_path / "rows.jsonl", [*SINGLE[:9], {"prompt": "p", "response": "another"}])
        return None

    with pytest.raises(UserError, match=r"rows\.jsonl: has changed while it was scored"):
        run(tmp_path, SINGLE, Lengths(change))
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_of_other_rows_or_another_scorer_is_refused(tmp_path: Path) -> None:
    """With what differs; the output stays as it is. So is a file that is not ours, or has been changed."""
    run(tmp_path, SINGLE, Lengths())
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match=r'scorer.scorer: "lengths" there, "others" now'):
        run(tmp_path, SINGLE, Lengths(name="others"))
    with pytest.raises(UserError, match=r"input\.content"):
        run(tmp_path, SINGLE[1:], Lengths())
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="has been changed"):
        run(tmp_path, SINGLE, Lengths(), rule="quantile")
    other = tmp_path / "other"
    other.mkdir()
    (other / "out.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="`uft score` has not written it"):
        run(other, SINGLE, Lengths())
    assert (other / "out.jsonl").read_text() == "mine\n"
    assert not (other / "out.jsonl.scoring").exists()


@pytest.mark.parametrize(
    "name", ["out.json", "data/out.jsonl", "data/below/out.jsonl", "nowhere/out.jsonl", "data.jsonl"]
)
def test_an_output_where_it_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    """Not a recipe's kind of file, in a folder that is the input, in no folder, or a folder itself."""
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data.jsonl").mkdir()
    write(tmp_path / "data" / "rows.jsonl", SINGLE)
    rows = Rows(Reading(str(tmp_path / "data"), "jsonl"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--out"):
        score_data(rows, Lengths(), Target(tmp_path / name, "quantile"))
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_rows_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    """By file and line, with how many there are; nothing is left behind. Quarantined, they are listed."""
    rows = [*SINGLE, '{"prompt": "p", "respnse": "r"}', '{"prompt": "p"', {"prompt": "p", "response": " "}]
    scorer = Lengths()
    with pytest.raises(UserError) as told:
        run(tmp_path, rows, scorer)
    assert f"{tmp_path}/rows.jsonl:11: unknown key 'respnse'" in str(told.value)
    assert "3 of 13 rows" in str(told.value)
    assert (scorer.asked, sorted(path.name for path in tmp_path.iterdir())) == ([], ["rows.jsonl"])
    with pytest.raises(UserError, match="--max-quarantined"):
        run(tmp_path, rows, scorer, max_quarantined=0.2)
    outcome = run(tmp_path, rows, scorer, max_quarantined=0.3)
    assert outcome.summary.left_out == {"bad row": 3}
    assert [one["place"].rpartition(":")[2] for one in read(tmp_path / "out.jsonl.scoring" / "quarantine.jsonl")] == [
        "11",
        "12",
        "13",
    ]


def test_what_json_has_no_word_for_is_written_in_its_words(tmp_path: Path) -> None:
    """Dates and NaN of a Parquet file, in columns that are not read and in meta: text, and null."""
    day = datetime(2020, 1, 2, tzinfo=UTC)
    extra = {"note": [math.nan], "day": [day]}
    for number, (named, columns) in enumerate(
        {
            "alpaca": {"instruction": ["p"], "output": ["r"], **extra},
            "jsonl": {"prompt": ["p"], "response": ["r"], "meta": [{name: value[0] for name, value in extra.items()}]},
        }.items()
    ):
        data, out = tmp_path / f"{number}.parquet", tmp_path / f"{number}.jsonl"
        parquet.write_table(pyarrow.table(columns), data)
        assert score_data(Rows(Reading(str(data), named)), Lengths(), Target(out, "affine:0,1")).is_written
        (row,) = read(out)
        assert (row["meta"]["note"], row["meta"]["day"][:10]) == (None, "2020-01-02")


def test_a_scorer_that_can_score_nothing_leaves_nothing(tmp_path: Path) -> None:
    """A wrong key is found with the first request: no folder stays. What was scored before a limit stays."""

    def refuse(item: Item) -> Judgement | None:
        raise UserError("wrong key")

    with pytest.raises(UserError):
        run(tmp_path, SINGLE, Lengths(refuse))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]

    def stop(item: Item) -> Judgement | None:
        if len(item.response) > 6:
            raise CheckFailed("the limit")
        return None

    with pytest.raises(CheckFailed):
        run(tmp_path, SINGLE, Lengths(stop))
    again = Lengths()
    run(tmp_path, SINGLE, again)
    assert len(again.asked) == 4


def test_an_answer_that_jsonl_has_no_score_for_is_left_out(tmp_path: Path) -> None:
    """A tool call, or thoughts beside the text; counted by reason."""
    call = {"name": "f", "arguments": {}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    thought = [turns[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    outcome = run(tmp_path, [SINGLE[0], {"messages": turns}, {"messages": thought}], Lengths())
    assert sum(outcome.summary.left_out.values()) == 2
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_a_record_of_a_damaged_line_is_refused_by_its_place(tmp_path: Path) -> None:
    """Not the last one, which a kill may have cut: a line in the middle."""
    run(tmp_path, SINGLE, Lengths())
    log = tmp_path / "out.jsonl.scoring" / "judgements.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"judgements\.jsonl:2: cannot be read"):
        run(tmp_path, SINGLE, Lengths(), rule="quantile")


@pytest.mark.parametrize("summary", ["", "[]", "null", '{"scorer"'])
def test_a_damaged_summary_is_as_none(summary: str, tmp_path: Path) -> None:
    """The output is written anew of its judgements, to the same bytes."""
    run(tmp_path, SINGLE, Lengths())
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.scoring" / "summary.json").write_text(summary)
    again = Lengths()
    assert run(tmp_path, SINGLE, again).is_written
    assert ((tmp_path / "out.jsonl").read_bytes(), again.asked) == (before, [])


def test_what_was_spent_is_counted_by_the_reply(tmp_path: Path) -> None:
    """Over all runs, also those that were cut off within a batch, in the middle of a line too."""
    data = write(tmp_path / "rows.jsonl", SINGLE)
    target = Target(tmp_path / "out.jsonl", "affine:0,1")
    begun: list[Tokens] = []

    def outcome(scorer: Lengths, replies: int) -> Outcome:
        def begin(spent: Tokens, keep: Callable[[Tokens], None]) -> None:
            begun.append(spent)
            for _ in range(replies):
                keep(Tokens(100, 10))

        return score_data(Rows(Reading(str(data), "jsonl")), scorer, target, on_begin=begin)

    def die(item: Item) -> Judgement | None:
        raise Killed

    with pytest.raises(Killed):
        outcome(Lengths(die), 2)
    ledger = tmp_path / "out.jsonl.scoring" / "spent.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b"[7")
    assert outcome(Lengths(), 1).summary.spent == Tokens(300, 30)
    assert begun == [Tokens(), Tokens(200, 20)]
