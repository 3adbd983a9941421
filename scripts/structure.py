"""The house in numbers: what docs/findings.md says of the package's structure. Reads the sources, imports nothing.

python scripts/structure.py [--check]      --check: exits 1 where a number misses its bar
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "uft_ds"
MOST_PARAMETERS = 8
MOST_ROOT_MODULES = 6
MOST_READERS_OF_THE_RECIPE = 8
RECIPE = "uft_ds.recipe.schema"


def module_name(file: Path) -> str:
    parts = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports_of(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it; not those for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if inner & modules else {node.module}
    return found & modules


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, by Kosaraju's two passes."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str, edges: dict[str, set[str]], into: list[str]) -> None:
        seen.add(name)
        for other in sorted(edges.get(name, ())):
            if other not in seen:
                visit(other, edges, into)
        into.append(name)

    for name in imports:
        if name not in seen:
            visit(name, imports, order)
    backwards: dict[str, set[str]] = {}
    for name, others in imports.items():
        for other in others:
            backwards.setdefault(other, set()).add(name)
    seen.clear()
    found = []
    for name in reversed(order):
        if name not in seen:
            members: list[str] = []
            visit(name, backwards, members)
            if len(members) > 1:
                found.append(sorted(members))
    return found


def long_signatures(tree: ast.Module, module: str) -> Iterator[str]:
    """Functions with too many parameters; kernels' launches and typer's commands are exempt."""
    if module.startswith((f"{PACKAGE.name}.kernels", f"{PACKAGE.name}.commands")):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            number = len([name for name in names if name not in ("self", "cls")])
            if number > MOST_PARAMETERS:
                yield f"{module}.{node.name} ({number})"


def comment_lines(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def main() -> int:
    files = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    signatures = [found for name, tree in trees.items() for found in long_signatures(tree, name)]
    imports = {name: imports_of(tree, set(files)) for name, tree in trees.items()}
    root = [name for name, file in files.items() if file.parent == PACKAGE]
    readers = sorted(name for name, others in imports.items() if RECIPE in others)
    found_circles = circles(imports)
    lines = sum(len(text.splitlines()) for text in texts.values())
    comments = sum(map(comment_lines, texts.values()))
    rows = [
        ("modules at the package's root", len(root), f"<= {MOST_ROOT_MODULES}", len(root) <= MOST_ROOT_MODULES, root),
        ("import circles", len(found_circles), "0", not found_circles, found_circles),
        ("functions with more than 8 parameters", len(signatures), "0", not signatures, signatures),
        (
            "modules that import the recipe",
            len(readers),
            f"<= {MOST_READERS_OF_THE_RECIPE}",
            len(readers) <= MOST_READERS_OF_THE_RECIPE,
            readers,
        ),
    ]
    for name, number, bar, holds, items in rows:
        print(f"{name:40} {number:>6}   bar {bar:6} {'' if holds else 'MISSED  ' + ', '.join(map(str, items))}")
    print(f"{'modules':40} {len(files):>6}")
    print(f"{'lines':40} {lines:>6}")
    print(f"{'lines with a comment':40} {comments:>6}   {100 * comments / lines:.1f}%")
    longest = sorted(files, key=lambda name: -len(texts[name].splitlines()))[:3]
    print(f"{'longest files':40} {', '.join(f'{n} {len(texts[n].splitlines())}' for n in longest)}")
    return 0 if "--check" not in sys.argv or all(holds for *_, holds, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
