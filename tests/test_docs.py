"""README.md and docs/architecture.md name modules and files of the project, and all documents link: these exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from uft_ds.host.gpus import known_gpus
from uft_ds.recipe.file import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uft_ds"
DOCUMENTS = ("README.md", "docs/architecture.md")
ALL_DOCUMENTS = ("README.md", "ds_configs/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PATH = re.compile(r"(?<![\w./~:-])(?:\./)?((?:[\w.-]+/)+[\w-]+\.(?:py|md|sh|png|json|toml))(?![\w/])")
NAMED = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def exists(path: str, document: str) -> bool:
    """Below the package, the project's root or the document's own folder."""
    return any((folder / path).exists() for folder in (PACKAGE, ROOT, (ROOT / document).parent))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    """Every path to a module, a script or another document is there; paths of a user's own have no folder."""
    paths = set(PATH.findall(text_of(document)))
    assert len(paths) > 5
    assert sorted(path for path in paths if not exists(path, document)) == []


def test_every_name_is_in_the_module_that_it_is_said_to_be_in() -> None:
    """docs/architecture.md writes `module.py`: `name`, and the module defines or holds each such name."""
    named = [
        (module, name)
        for module, names in NAMED.findall(text_of("docs/architecture.md"))
        for name in re.findall(r"`([\w.]+)`", names)
        if not name.endswith(".py")
    ]
    assert len(named) > 25
    missing = []
    for module, name in named:
        code = (PACKAGE / module).read_text(encoding="utf-8")
        for part in name.split("."):
            if not re.search(rf"^\s*(?:(?:def|class) {part}\b|{part}\b.*[:=])", code, re.MULTILINE):
                missing.append(f"{module}: {name}")
    assert missing == []


def test_the_tree_lists_every_package() -> None:
    """Each folder of the package stands in the tree, and each folder of the tree is there; so it is with the root's."""
    inside, _, beside = text_of("docs/architecture.md").partition("    uft_ds/\n")[2].partition("\n    ds_configs/")
    listed = set(re.findall(r"^ {6}([\w]+)/", inside, re.MULTILINE))
    there = {init.parent.name for init in PACKAGE.glob("*/__init__.py")}
    assert listed == there
    tracked = {"ds_configs", *re.findall(r"^ {4}([\w]+)/", beside.partition("\n\n")[0], re.MULTILINE)}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    folders = {name.partition("/")[0] for name in files if "/" in name and not name.startswith(".")}
    assert not files or tracked | {"uft_ds"} == folders
    project = tomllib.loads(text_of("pyproject.toml"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]) >= tracked | {"uft_ds"}


def test_the_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    """The smallest recipe that a reader would copy is accepted as it stands."""
    lines = text_of("README.md").partition("    name: mine\n")[2].partition("\n\n")[0].splitlines()
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n" + "".join(f"{line.removeprefix('    ')}\n" for line in lines), encoding="utf-8")
    recipe = load_recipe(str(path))
    assert (recipe.name, len(recipe.data.sources), recipe.train.samples) == ("mine", 2, 8)


def anchors_of(path: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ALL_DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    """Each relative link leads to a file that is there, and to a heading of it where it names one."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        name, _, anchor = link.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if not link.startswith("http") and (not path.exists() or (anchor and anchor not in anchors_of(path))):
            broken.append(link)
    assert broken == []


def test_the_cards_of_the_document_are_those_of_the_table() -> None:
    """docs/plan.md has each known GPU with its figures and the document that they are from, and no other."""
    rows = re.findall(
        r"^\| `([a-z][\w-]+)` \| (.*) \|$", text_of("docs/plan.md").partition("## Cards")[2], re.MULTILINE
    )
    written = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    expected = {}
    for name, gpu in known_gpus().items():
        rates = (gpu.hbm_bytes_per_second, gpu.nvlink_bytes_per_second, gpu.pcie_bytes_per_second)
        figures = [gpu.memory_gb, gpu.flops_per_second / 1e12, *(rate / 1e9 for rate in rates)]
        expected[name] = [gpu.name, *(f"{figure:g}" for figure in figures), gpu.source]
    assert written == expected
