"""The quickstart before it has a model."""

from pathlib import Path

import pytest

from uft_ds.commands.shared import console
from uft_ds.examples import quickstart


def test_a_folder_that_cannot_be_written_comes_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file nothing can be made; the command tells the path of such an error with exit code 2."""
    monkeypatch.setattr(quickstart, "quickstart_model", lambda **_: pytest.fail("the model was fetched"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as refused:
        quickstart.run_quickstart(tmp_path / "file", (), console=console, train=pytest.fail)
    assert refused.value.filename == str(tmp_path / "file" / "quickstart-data")
