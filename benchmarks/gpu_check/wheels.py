"""Wheels for a machine with torch and without a network: collect them here, install them there.

Run by `scripts/gpu_check.sh`; the standard library and pip are all it needs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
OF_TORCH = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|pytorch-triton.*)$")
"""Packages that come with a build of torch for the machine's GPU: gigabytes, and the machine's own choice."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def plain(name: str) -> str:
    """A package's name in one spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """Those of the project, and of the comparison with TRL."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    peers = [one for one in project["optional-dependencies"]["bench"] if one.startswith("trl")]
    return [*project["dependencies"], *peers]


def collect(folder: Path, python: str, have: set[str]) -> None:
    """Fill a folder with wheels of everything that the project needs, but for torch and what the target has."""
    folder.mkdir(parents=True, exist_ok=True)
    for_target = ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        for_target += ["--platform", platform]
    # DeepSpeed is published as source alone: its wheel holds no compiled code, and is the same for all versions.
    sources = [one for one in requirements() if plain(re.split(r"[<>=!~\[]", one)[0]) == "deepspeed"]
    others = [one for one in requirements() if one not in sources]
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *sources)
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.json"
        # Only what would be installed is asked for: no wheel of torch is fetched to find that out.
        _pip(
            "install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--target", name, "--report",
            str(report), *for_target, *others, *_needs_of(folder, "deepspeed"),
        )  # fmt: skip
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    pinned = {plain(one["metadata"]["name"]): one["metadata"]["version"] for one in found}
    wanted = [
        f"{name}=={version}"
        for name, version in sorted(pinned.items())
        if not OF_TORCH.match(name) and name not in have and name != "deepspeed"
    ]
    if wanted:
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *for_target, *wanted)
    megabytes = sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6
    left_out = sorted(name for name in pinned if OF_TORCH.match(name) or name in have)
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {megabytes:.0f} MB; left out: {', '.join(left_out)}")


def _needs_of(folder: Path, package: str) -> list[str]:
    """What the package's wheel in a folder requires, without extras."""
    import zipfile

    (wheel,) = folder.glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needs = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [need for need in needs if "extra" not in need.partition(";")[2]]


def install(wheels: Path, site: Path) -> int:
    """Install all wheels of a folder into another one; the exit code tells whether all could be.

    One that does not fit this machine must not keep the others out: then each is installed by itself.
    """
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        print(f"{wheels} holds no wheels")
        return 1
    command = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
    if _run([*command, *files]).returncode == 0:
        return 0
    failed = [file for file in files if _run([*command, file]).returncode != 0]
    for file in failed:
        print(f"could not be installed: {Path(file).name}")
    return 1 if failed else 0


def _pip(*arguments: str) -> None:
    result = _run(list(arguments))
    if result.returncode != 0:
        sys.exit(f"pip {arguments[0]} failed:\n{result.stderr[-3000:]}")


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> int:
    """Collect or install."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("what", choices=["collect", "install"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("site", type=Path, nargs="?")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--have", type=Path)
    options = parser.parse_args()
    if options.what == "install":
        return install(options.folder, options.site)
    lines = options.have.read_text(encoding="utf-8").split() if options.have else []
    collect(options.folder, options.python, {plain(re.split(r"[=<>@ ]", line)[0]) for line in lines})
    return 0


if __name__ == "__main__":
    sys.exit(main())
