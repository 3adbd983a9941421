"""`uft score` as a user runs it: exit codes, a kill in the middle, a dry run, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from judges import Asked, Fault, StandIn, grade, judge
from runs import uft, write_rows
from suites import long_but

from uft_ds.scoring.item import Tokens
from uft_ds.scoring.run import Progress
from uft_ds.scoring.shown import progress_line

ROWS = [{"prompt": f"p{number}", "response": f"answer {number}"} for number in range(60)]


def words(folder: Path, at: StandIn, *further: str) -> list[str]:
    return [
        *("score", str(folder / "rows.jsonl"), "--by", "judge", "--out", str(folder / "out.jsonl")),
        *("--judge-url", at.url, "--judge-model", "stand-in", "--cache", str(folder / "cache"), *further),
    ]


def by_number(asked: Asked) -> str:
    """Grades from 1 to 10 by the answer's number."""
    return f'{{"{asked.nonce}": {1 + int(asked.between("answer").split()[1]) % 10}}}'


@pytest.mark.parametrize(
    "number",
    long_but([signal.SIGKILL], [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
    ids=lambda number: number.name,
)
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(number: signal.Signals, tmp_path: Path) -> None:
    """At a moment when about half is asked: nothing that was answered is asked again."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", ROWS)
    half = threading.Event()

    def answer(asked: Asked) -> str:
        if asked.number == 30:
            half.set()
            time.sleep(2)
        return by_number(asked)

    with judge(by_number) as at:
        assert uft(*words(tmp_path / "whole", at)).returncode == 0
        at.asked.clear()
        at.answer = answer
        process = subprocess.Popen(
            [sys.executable, "-m", "uft_ds", *words(tmp_path / "cut", at, "--concurrency", "2")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert half.wait(60)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), said
        assert number == signal.SIGKILL or "the same command goes on" in said
        assert not (tmp_path / "cut" / "out.jsonl").exists()
        record = tmp_path / "cut" / "out.jsonl.scoring" / "judgements.jsonl"
        assert len(record.read_text().splitlines()) >= 20  # in batches of 8
        at.answer = by_number
        ended = uft(*words(tmp_path / "cut", at))
        assert ended.returncode == 0, ended.stderr
        questions = [asked.between("answer") for asked in at.asked]
    assert (tmp_path / "cut" / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()
    assert len(questions) - len(set(questions)) <= 2  # those under way at the kill
    rows = [json.loads(line) for line in (tmp_path / "cut" / "out.jsonl").read_text().splitlines()]
    assert [round(row["score"] * 9) for row in rows] == [number % 10 for number in range(60)]


def test_failures_decide_the_exit_code(tmp_path: Path) -> None:
    """11 of 60 answers fail (5, and 50 to 59): 0.2 are tolerated and left out, 0.05 are not; another judge gives 2."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with judge(lambda asked: Fault(400) if "answer 5" in asked.question else by_number(asked)) as at:
        ended = uft(*words(tmp_path, at, "--max-failures", "0.05"))
        assert (ended.returncode, (tmp_path / "out.jsonl").exists()) == (1, False)
        assert "18.3% of the answers have no score" in ended.stdout
        assert "11: HTTP 400 (not now)" in ended.stdout
        ended = uft(*words(tmp_path, at, "--max-failures", "0.2"))
        assert ended.returncode == 0, ended.stderr
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 49
        assert len(at.asked) == 60 + 11
        at.answer = lambda asked: Fault(401)
        ended = uft(*words(tmp_path, at, "--judge-body", '{"seed": 1}'))
        assert ended.returncode == 2
        assert "was scored differently: scorer.body" in ended.stderr


def test_a_limit_that_is_reached_gives_3(tmp_path: Path) -> None:
    """What was scored stays; with a higher limit the same command finishes."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with judge(by_number) as at:
        small = ("--judge-body", '{"max_tokens": 20}')
        ended = uft(*words(tmp_path, at, *small, "--max-tokens-spent", "3000"))
        assert ended.returncode == 3
        assert "--max-tokens-spent 3,000" in ended.stderr
        assert "goes on" in ended.stderr
        before = len(at.asked)
        assert 0 < before < 28
        ended = uft(*words(tmp_path, at, *small, "--price", "1,2", "--max-cost", "1"))
        assert ended.returncode == 0, ended.stderr
        assert len(at.asked) == 60
        assert "0.0072" in ended.stdout  # 60 * (100 * 1 + 10 * 2) / 1e6


def test_a_dry_run_asks_and_writes_nothing(tmp_path: Path) -> None:
    """It counts questions, tokens and cost, and shows the first question."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with judge(grade(5)) as at:
        ended = uft(*words(tmp_path, at, "--dry-run", "--price", "1,1"))
        assert ended.returncode == 0, ended.stderr
        assert at.asked == []
    assert "60 rows, 60 answers to score; 0 of them are scored already" in ended.stdout
    assert "60 questions to the judge, 0 of them" in ended.stdout
    assert "at most about 0.0" in ended.stdout
    assert "answer 0" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--by", "length"], "needs --map"),
        (["--by", "lenght", "--map", "quantile"], "--by: found 'lenght', expected code:"),
        (["--by", "length", "--map", "quantil"], "--map: found 'quantil', expected sigmoid"),
        (["--by", "length", "--map", "quantile", "--pairwise"], "go with --by judge"),
        (["--by", "regex:9", "--scale", "0,5", "--max-cost", "1"], "--scale, --max-cost: options that go with --by"),
        (["--by", "regex:9", "--max-length", "9"], "go with --by reward"),
        (["--by", "regex:9", "--time-limit", "inf"], "--time-limit"),
        (["--by", "judge", "--timeout", "1e10"], "--timeout"),
        (["--by", "length", "--map", "quantile", "--columns", "[1]"], "--columns"),
        (["--by", "length", "--map", "quantile", "--columns", "{prompt: [1]}"], "--columns"),
        (["--by", "length", "--map", "quantile", "--score-range", "5,1"], "--score-range"),
        (["--by", "length", "--map", "quantile", "--format", "jsnol"], "no format 'jsnol'"),
        (["--by", "judge"], "--judge-url"),
        (["--by", "judge", "--judge-url", "http://h/v1", "--judge-model", "m", "--price", "1"], "--price"),
        (["--by", "judge", "--judge-url", "http://h/v1", "--judge-model", "m", "--scale", "1"], "--scale"),
        (["--by", "judge", "--judge-url", "http://h/v1", "--judge-model", "m", "--pairwise"], "rows.jsonl:1"),
        (["--by", "code:nowhere:f"], "no module nowhere"),
        (["--by", "reward:nowhere", "--map", "sigmoid"], "no such folder"),
    ],
    ids=range(18),
)
def test_bad_options_are_refused(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the option, what was found and expected; nothing is written."""
    from uft_ds.cli import main

    write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["uft", "score", "rows.jsonl", "--out", "out.jsonl", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_progress_line_counts_this_run_alone_for_its_rate() -> None:
    """500 of 1,000 were there before; 100 more in 10 seconds: 10 a second, 400 left take 40 seconds."""
    line = progress_line(Progress(600, 1000, 500, 2, Tokens(900, 100), 10.0), lambda tokens: tokens.total / 1000)
    assert line == "scored 600 of 1,000  10/s  40 s left  2 failed  1,000 tokens  cost 1.0000"


@pytest.mark.long
def test_a_kill_leaves_no_process_of_the_users_code(tmp_path: Path) -> None:
    """A function that loops for ever, whose parent cannot end it any more, is ended by its own alarm: 2 + 2 seconds."""
    (tmp_path / "ours.py").write_text(
        "import os\n"
        "def f(messages, response, meta):\n"
        "    with open('begun.tmp', 'w') as file:\n"
        "        file.write(str(os.getpid()))\n"
        "    os.rename('begun.tmp', 'begun')\n"
        "    while True:\n"
        "        pass\n"
    )
    write_rows(tmp_path / "rows.jsonl", ROWS)
    command = [sys.executable, "-m", "uft_ds", "score", "rows.jsonl", "--by", "code:ours:f", "--out", "out.jsonl"]
    process = subprocess.Popen(
        [*command, "--time-limit", "2", "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    until(lambda: (tmp_path / "begun").exists(), 60)
    process.kill()
    process.wait(timeout=30)
    worker = int((tmp_path / "begun").read_text())
    until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, 30)


def until(look: Callable[[], Any], seconds: float) -> Any:
    """What `look` finds at last."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing was found in time"
        time.sleep(0.05)
    return found
