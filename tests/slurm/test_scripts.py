"""The batch scripts as they are: what any bash accepts, and what every job needs."""

import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
BATCH = ("uft_qwen32b.sh", "online.sh", "sweep.sh")
SOURCED = {"online.sh": ("server.sh", "launch.sh")}


@pytest.mark.parametrize("script", [*BATCH, "launch.sh", "server.sh", "table.sh", "site.env.example"])
def test_bash_can_read_it(script: str) -> None:
    """Without running it."""
    checked = subprocess.run(["bash", "-n", SLURM / script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("script", BATCH)
def test_a_job_can_come_back(script: str) -> None:
    """Requeued with its log kept, warned before its limit, one launcher a node; nothing of a site's own."""
    text = (SLURM / script).read_text()
    options = [line.split("#SBATCH ")[1].split()[0] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--signal=B:USR1@600"} <= set(options)
    assert not [option for option in options if option.startswith(("--partition", "--account", "--qos"))]


@pytest.mark.parametrize("script", BATCH)
def test_settings_are_explained_where_they_are_read(script: str) -> None:
    """Every UFT_ variable stands in a comment."""
    files = (script, *SOURCED.get(script, ("launch.sh",)))
    lines = [line for name in files for line in (SLURM / name).read_text().splitlines()]
    explained = set(re.findall(r"UFT_[A-Z_]+", "\n".join(line for line in lines if line.startswith("#"))))
    used = set(re.findall(r"UFT_[A-Z_]+", "\n".join(line for line in lines if not line.startswith("#"))))
    assert used - explained == {"UFT_SLURM", "UFT_NODE_CACHE", "UFT_OUTCOME"}, "the scripts' own"


def test_a_checkpoint_that_is_written_again_is_a_new_one(tmp_path: Path) -> None:
    """A damaged step-000400 is set aside and its step written again: the job has made progress."""

    def newest() -> str:
        command = ["bash", "-c", '. "$1" && _newest_checkpoint "$2"', "bash", SLURM / "launch.sh", tmp_path / "run"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert newest() == ""
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-000200", "step-000400"):
        (checkpoints / name).mkdir(parents=True)
    before = newest()
    assert "step-000400" in before
    assert newest() == before
    (checkpoints / "step-000400").rename(checkpoints / "step-000400.damaged")
    assert "step-000200" in newest()
    (checkpoints / "step-000400").mkdir()
    assert "step-000400" in newest()
    assert newest() != before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["default"]),
        (["train.lr=1e-5"], ["default", "train.lr=1e-5"]),
        (["mine.yaml", "train.lr=1e-5"], ["mine.yaml", "train.lr=1e-5"]),
        (["a=b.yaml", "train.lr=1e-5"], ["a=b.yaml", "train.lr=1e-5"]),
        (["quickstart"], ["quickstart"]),
    ],
)
def test_the_first_argument_may_be_a_recipe(tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    """A file, whatever its name, or a word that is no override; the script's own recipe otherwise."""
    (tmp_path / "a=b.yaml").touch()
    text = 'say() { printf "%s\\n" "$@"; }; . "$1"; shift; with_recipe say default "$@"'
    done = subprocess.run(
        ["bash", "-c", text, "bash", SLURM / "launch.sh", *arguments],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines() == expected
