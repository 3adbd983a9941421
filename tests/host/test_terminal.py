"""Text of data and of file names does not control the terminal."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from uft_ds.host.terminal import SafeConsole, visible


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
