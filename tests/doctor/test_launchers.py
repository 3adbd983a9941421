"""Launchers on the PATH."""

import subprocess
from pathlib import Path

import pytest

from uft_ds.doctor.launchers import MODULES, check_launcher, check_slurm


def script(path: Path, first: str = "#!/bin/sh") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{first}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", MODULES)
def test_a_launcher_must_start_this_python(tmp_path: Path, name: str) -> None:
    """Missing: a note with the module; another environment's: a note; this one's, by place or first line: ok."""
    python = str(tmp_path / "venv" / "bin" / "python")
    missing = check_launcher(name, {"PATH": str(tmp_path / "empty")}, python)
    assert missing.state == "note"
    assert f"{python} -m {MODULES[name]}" in missing.remedy
    other = script(tmp_path / "other" / name, "#!/usr/bin/python3")
    found = check_launcher(name, {"PATH": str(other.parent)}, python)
    assert found.state == "note"
    assert f"{python} -m {MODULES[name]}" in found.remedy
    assert f"{other} belongs to another Python" in found.found
    script(other, f"#!{python}")
    assert check_launcher(name, {"PATH": str(other.parent)}, python).state == "ok"
    script(tmp_path / "venv" / "bin" / name)
    assert check_launcher(name, {"PATH": f"{tmp_path}/venv/bin:{other.parent}"}, python).state == "ok"


@pytest.mark.parametrize(
    ("quoted", "folder"), [("{}", "long"), ('"{}"', "with a space"), ("'{}'", "with a space"), ("{} -E", "long")]
)
def test_a_path_that_is_too_long_for_a_first_line(tmp_path: Path, quoted: str, folder: str) -> None:
    """Installers then have sh start Python, in a second line, with or without quotes: it is run to be sure."""
    ours = script(tmp_path / folder / ("x" * 200) / "bin" / "python", '#!/bin/sh\necho "$@"')
    line = quoted.format(ours)
    launcher = script(tmp_path / "bin" / "torchrun", f"#!/bin/sh\n'''exec' {line} \"$0\" \"$@\"\n' '''")
    ran = subprocess.run([launcher, "--help"], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-2:] == [str(launcher), "--help"]
    environ = {"PATH": str(launcher.parent)}
    assert check_launcher("torchrun", environ, str(ours)).state == "ok"
    assert check_launcher("torchrun", environ, str(tmp_path / "other" / "bin" / "python")).state == "note"


@pytest.mark.parametrize("head", ["", "\x7fELF", "#!", "#!/bin/sh", "#!/bin/sh\n'''exec' \"/open"])
def test_a_launcher_that_is_no_script_of_pythons(tmp_path: Path, head: str) -> None:
    """Whatever it is, it is not this environment's."""
    launcher = script(tmp_path / "bin" / "torchrun", head)
    assert check_launcher("torchrun", {"PATH": str(launcher.parent)}, "/env/bin/python").state == "note"


def test_slurm_is_no_must_but_should_answer(tmp_path: Path) -> None:
    """No srun is fine; one that fails is not."""
    assert check_slurm({"PATH": str(tmp_path)}).state == "ok"
    srun = script(tmp_path / "srun")
    srun.write_text("#!/bin/sh\necho slurm 23.11.4\n")
    assert "slurm 23.11.4" in check_slurm({"PATH": str(tmp_path)}).found
    srun.write_text("#!/bin/sh\nexit 1\n")
    assert check_slurm({"PATH": str(tmp_path)}).state == "problem"
