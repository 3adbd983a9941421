"""Names beyond the file system's 255 bytes, such as a sentence given as a path, are a user's error in every command."""

import sys

import pytest

from uft_ds import cli

LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe", "show", LONG],
        ["status", LONG],
        ["checkpoint", "ls", LONG],
        ["data", "preview", f"folder/{LONG}.yaml"],
        ["convert", LONG, "merged"],
        ["plan", LONG],
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)
def test_a_name_that_no_file_can_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """Exit code 2 and one sentence with the beginning of the name; no traceback."""
    monkeypatch.setattr(sys, "argv", ["uft", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "aaaa" in message
    assert len(message) < 1200
