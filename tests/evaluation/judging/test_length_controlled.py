"""The win rate at equal lengths: what alpaca_eval's regression is given, by a stand-in for that package.

The package itself is no dependency of the tests. By hand, alpaca_eval 0.6.6 gave 57.91303649038667 for 805 made-up
judgements through the command as well as called directly, with the reference's file in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.judging.length_controlled import length_control
from uft_ds.evaluation.judging.wins import Duel
from uft_ds.scoring.item import Judgement

REGRESSION = """
import json, os
from huggingface_hub import hf_hub_download

print("words on standard output")

def get_length_controlled_winrate(annotations, save_weights_dir="auto"):
    assert save_weights_dir is None
    gamed = open(hf_hub_download(repo_id="tatsu-lab/alpaca_eval", filename="df_gamed.csv")).read()
    rows = annotations.reset_index().to_dict("records")
    json.dump([gamed, rows], open(os.environ["SEEN"], "w"))
    return {"length_controlled_winrate": RATE}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, and a package that writes what it is given to `seen.json`."""
    folder = tmp_path / "packages"
    (folder / "alpaca_eval" / "metrics").mkdir(parents=True)
    for name in ("__init__.py", "metrics/__init__.py"):
        (folder / "alpaca_eval" / name).write_text("")
    (folder / "alpaca_eval" / "metrics" / "glm_winrate.py").write_text(REGRESSION.replace("RATE", "25.0"))
    (folder / "alpaca_eval-0.6.6.dist-info").mkdir()
    (folder / "alpaca_eval-0.6.6.dist-info" / "METADATA").write_text("Name: alpaca_eval\nVersion: 0.6.6\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    (tmp_path / "df_gamed.csv").write_text("gamed\n")
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": text} for text in ("b", "a", "b")]))
    return tmp_path


DUELS = [Duel("f:1", "a", "own a", "ref a"), Duel("f:2", "b", "own b", "ref b"), Duel("f:3", "b", "more", "ref", 1)]
JUDGED = [Judgement(1.0), Judgement(0.25), Judgement(0.0)]


def test_the_regression_is_given_alpaca_evals_order_and_scale(package: Path) -> None:
    """1 for the reference to 2 for the model, at the instruction's place in the list, though it stands there twice."""
    control = length_control(package, DUELS)
    assert control.metrics(DUELS, JUDGED, ("m", "ref")) == {"length_controlled_win_rate": 0.25}
    gamed, rows = json.loads((package / "seen.json").read_text())
    assert gamed == "gamed\n"
    assert [(row["index"], row["preference"], row["output_1"], row["output_2"]) for row in rows] == [
        (0, 1.25, "ref b", "own b"),
        (1, 2.0, "ref a", "own a"),
        (2, 1.0, "ref", "more"),
    ]
    assert {(row["generator_1"], row["generator_2"]) for row in rows} == {("ref", "m")}
    assert control.identity()["alpaca_eval"] == "0.6.6"


def test_a_missing_judgement_is_no_number(package: Path) -> None:
    """Nor is what the regression does not end with."""
    control = length_control(package, DUELS)
    with pytest.raises(CheckFailed, match="1 are missing"):
        control.metrics(DUELS, [*JUDGED[:2], Judgement(None, "why")], ("m", "ref"))
    module = package / "packages" / "alpaca_eval" / "metrics" / "glm_winrate.py"
    for rate, said in (("float('nan')", "has failed"), ("1 / 0", "ZeroDivisionError")):
        module.write_text(REGRESSION.replace("RATE", rate))
        with pytest.raises(CheckFailed, match=said):
            control.metrics(DUELS, JUDGED, ("m", "ref"))


def test_other_instructions_than_alpaca_evals_are_refused(package: Path) -> None:
    """The regression knows the difficulty of its own instructions alone."""
    with pytest.raises(UserError, match="is of all 3 instructions"):
        length_control(package, DUELS[:2])
    with pytest.raises(UserError, match="here are 3, 2 of them from there"):
        length_control(package, [*DUELS[:2], Duel("f:3", "c", "x", "y")])
    (package / "df_gamed.csv").unlink()
    with pytest.raises(UserError, match=r"no df_gamed\.csv in it"):
        length_control(package, DUELS)


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=r"pip install alpaca_eval==0\.6\.6"):
        length_control(tmp_path, DUELS)
