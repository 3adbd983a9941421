"""The documentation site's hook of MkDocs (`mkdocs.yml`, `make docs`): it adds the pages that are not in docs/.

These are the generated ones of `reference_pages.py` and `recipe_pages.py`, and README.md and other files beside docs/
that pages link to. Links between files of the repository, which GitHub follows, become links of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from recipe_pages import recipe_pages
from reference_pages import reference_pages

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "ds_configs/README.md": "deepspeed_files.md",
    "uft_ds/data/formats/jsonl.schema.json": "jsonl.schema.json",
}
"""Files outside docs/ that the site has, and their place in it."""
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/. MkDocs calls it once, with the files that it found there."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/, which lead somewhere on GitHub, lead to the same file of the site."""
    is_written = page.file.generated_by is None
    return linked_inside(markdown, "docs") if is_written else markdown


def pages() -> dict[str, str]:
    """Each page that is not in docs/: its place in the site, and its text.

    Raises:
        UserError, ValueError: as `recipe_pages` and `reference_pages`.
    """
    copies = {
        place: linked_inside((ROOT / path).read_text(encoding="utf-8"), posixpath.dirname(path))
        for path, place in ELSEWHERE.items()
    }
    return {**copies, **recipe_pages(), **reference_pages()}


def linked_inside(markdown: str, folder: str) -> str:
    """Relative links of a file of this folder of the repository, as a page at the site's root has them."""

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else link[1])

    return LINK.sub(moved, markdown)
