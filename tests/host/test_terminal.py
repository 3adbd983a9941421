"""Text of data and of file names does not control the terminal."""

import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from uft_ds.host.terminal import SafeConsole, as_typed, duration, in_one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07 \x1b[2J", "␛]0;title␇ ␛[2J"),
        ("a\rb\bc\x7f", "a␍b␈c␡"),
        ("\x9b2J", "\\x9b2J"),  # one character that terminals of 8 bits read as ESC [
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("é\n\t中 🙂", "é\n\t中 🙂"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    """As pictures or escapes; text of any language, newlines and tabs stay."""
    assert visible(text) == shown


def test_a_console_shows_them_wherever_they_stand() -> None:
    """In text and in cells; the console's own colours stay."""
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="standard", markup=False)
    table = Table("path\x1b[2J")
    table.add_row(Text("row\x1b[31m", "red"))
    console.print(table)
    console.print("name\x1b]0;x")
    written = file.getvalue()
    assert "\x1b[2J" not in written
    assert "\x1b]" not in written
    assert "path␛" in written
    assert "row␛" in written
    assert "\x1b[31m" in written  # red, by the console itself


def test_paths_below_the_working_directory_are_shown_as_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they stand in a text; those of another folder stay, also where its name only ends or begins alike."""
    here = tmp_path / "my runs"
    here.mkdir()
    monkeypatch.chdir(here)
    assert as_typed(f"{here}/data/rows.jsonl:43: bad, and {here}/../other.jsonl") == (
        "data/rows.jsonl:43: bad, and ../other.jsonl"
    )
    assert as_typed(f"output={here}/run ({here}/a)") == "output=run (a)"
    for elsewhere in (f"/mnt{here}/rows.jsonl", f"{here}2/rows.jsonl", str(here), f"{here}/", "rows.jsonl"):
        assert as_typed(elsewhere) == elsewhere
    file = io.StringIO()
    SafeConsole(file=file, width=200).print(f"logs in {here}/runs/mine")
    assert file.getvalue() == "logs in runs/mine\n"
    monkeypatch.chdir("/")
    assert as_typed("/data/rows.jsonl") == "/data/rows.jsonl"


def test_a_directory_that_is_gone_changes_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message must still be shown there."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert as_typed(f"{gone}/rows.jsonl") == f"{gone}/rows.jsonl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two", "one two"),
        (" one\n\ttwo three ", "one two three"),
        ("one two three four", "one two three ..."),
        ("one two threes four", "one two ..."),
        ("x" * 20, "x" * 13 + " ..."),
        ("", ""),
    ],
)
def test_a_long_reason_ends_behind_a_word(text: str, shown: str) -> None:
    """Of 13 letters; a word that is longer than all of it is cut."""
    assert in_one_line(text, 13) == shown


def test_durations_have_two_units() -> None:
    """Hours and minutes, minutes and seconds, or seconds."""
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 7260)] == [
        "0 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 1 min",
    ]
