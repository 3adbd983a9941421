"""Wins of AlpacaEval against a stand-in judge that is an HTTP server."""

from __future__ import annotations

import random

import pytest
from judged import Uft, by_quality, hostile_answers, number_in, write_outputs
from judges import Answer, Asked, Fault, judge

from uft_ds.evaluation.results import read_evaluation, read_items


def test_a_win_rate_by_hand(uft: Uft) -> None:
    """Two wins, a loss, a tie, and two contradictions that count as ties: 3.5 of 6. Each is asked in both orders."""
    write_outputs(uft.folder / "a.json", ["q 5", "q 6", "q 1", "q 3", "first 1", "first 9"], "m")
    write_outputs(uft.folder / "r.json", ["q 1", "q 2", "q 2", "r 3", "ref 1", "ref 100"], "ref")
    with judge(by_quality) as at:
        code, out, err = uft.alpaca_eval(at)
    assert code == 0, err
    assert len(at.asked) == 12
    found = read_evaluation(uft.folder / "out")
    (task,) = found.tasks
    assert (found.name, task.task, task.items, task.judge) == ("m", "alpaca_eval", 6, "stand-in")
    assert task.metrics["win_rate"] == pytest.approx(3.5 / 6)
    assert task.metrics["contradictions"] == pytest.approx(2 / 6)
    assert task.metrics["failed"] == 0
    assert task.metrics["average_characters"] == pytest.approx((4 * 3 + 2 * 7) / 6)
    assert task.metrics["average_characters,reference"] == pytest.approx((4 * 3 + 5 + 7) / 6)
    assert 0 < task.metrics["win_rate,low_95"] < 3.5 / 6 < task.metrics["win_rate,high_95"] < 1
    items = read_items(uft.folder / "out", "alpaca_eval")
    assert [item.values["win_rate"] for item in items] == [1.0, 1.0, 0.0, 0.5, 0.5, 0.5]
    assert len({item.item for item in items}) == 6  # though each instruction stands there twice
    assert "58.3%" in out
    assert all("stand-in" in line for line in out.splitlines() if " win_rate" in line)


def test_half_a_verdict_is_none(uft: Uft) -> None:
    """An instruction of which one order fails is in no mean, and counted."""
    write_outputs(uft.folder / "a.json", ["q 5", "q 6", "q 1", "q 3"], "m")
    write_outputs(uft.folder / "r.json", ["q 1", "q 2", "q 2", "q 9"], "ref")

    def answer(asked: Asked) -> str | Fault:
        return Fault(400) if asked.between("answer_a") == "q 9" else by_quality(asked)

    with judge(answer) as at:
        code, out, _ = uft.alpaca_eval(at, "--max-failures", "0.5")
    assert code == 0
    metrics = read_evaluation(uft.folder / "out").tasks[0].metrics
    assert (metrics["win_rate"], metrics["failed"]) == (pytest.approx(2 / 3), 0.25)
    assert "1 of 4 judgements are missing" in out


@pytest.mark.long
def test_no_hostile_answer_moves_a_comparison(uft: Uft) -> None:
    """0 of 200: the choice is that of a hidden table, and both answers are quoted around it, in both orders."""
    hidden = [random.Random(number).choice(("win", "loss", "tie")) for number in range(200)]
    texts = [text.replace(": 10}", ': "A"}') for text in hostile_answers()]
    write_outputs(uft.folder / "a.json", texts, "m")
    write_outputs(uft.folder / "r.json", [f"plain {number}" for number in range(200)], "ref")

    def answer(asked: Asked) -> str:
        a, b = asked.between("answer_a"), asked.between("answer_b")
        hostile, is_first = (b, False) if a.startswith("plain ") else (a, True)
        wins = {"win": is_first, "loss": not is_first}.get(hidden[number_in(hostile)])
        choice = "tie" if wins is None else "A" if wins else "B"
        return f'{a}\n{b}\n{{"{asked.nonce}": "{choice}"}}\n{a}'

    with judge(answer) as at:
        code, _, err = uft.alpaca_eval(at)
    assert code == 0, err
    shares = {"win": 1.0, "loss": 0.0, "tie": 0.5}
    assert [one["value"] for one in uft.judgements()] == [shares[one] for one in hidden]


@pytest.mark.parametrize(
    ("answers", "further", "said"),
    [
        (["q 1"], [], "r.json:1: its instruction has no answer in"),
        (["q 1"] * 3, [], "a.json:1: its instruction is not in"),
        (["q 1"] * 2, ["--questions", "q.jsonl"], "--questions: of no use with --benchmark alpaca_eval"),
    ],
)
def test_other_instructions_are_refused(uft: Uft, answers: list[str], further: list[str], said: str) -> None:
    write_outputs(uft.folder / "a.json", answers, "m")
    write_outputs(uft.folder / "r.json", ["q 1", "q 2"], "ref")
    with judge(by_quality) as at:
        code, _, err = uft.alpaca_eval(at, *further)
    assert (code, at.asked) == (2, [])
    assert said in err


def test_the_first_instructions_alone(uft: Uft) -> None:
    """By --limit, a file of fewer answers is judged."""
    write_outputs(uft.folder / "a.json", ["q 3"], "m")
    write_outputs(uft.folder / "r.json", ["q 1", "q 2"], "ref")
    answer: Answer = by_quality
    with judge(answer) as at:
        assert uft.alpaca_eval(at, "--limit", "1")[0] == 0
    assert read_evaluation(uft.folder / "out").tasks[0].items == 1
