"""The documentation site: its generated reference lacks nothing, every page has a place, text stays what it is."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from uft_ds import cli, errors
from uft_ds.planning.hardware import Figures, cluster_of, in_gb
from uft_ds.planning.plan import make_plan
from uft_ds.recipe.described import describe_keys
from uft_ds.recipe.file import recipe_from_tree, shipped_recipes
from uft_ds.recipe.to_settings import settings_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "ds_configs/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)


@pytest.fixture(scope="module")
def hook() -> Iterator[ModuleType]:
    """The hook as MkDocs loads it: with its folder first among those that are searched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import site_hook

        yield site_hook
    for name in ("site_hook", "recipe_pages", "reference_pages"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def reference(hook: ModuleType) -> dict[str, str]:
    return hook.reference_pages()


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", page, re.MULTILINE)


def test_every_key_is_explained(reference: dict[str, str]) -> None:
    """Each key of `uft recipe keys` has a heading; below it stand its meaning, its default and its words."""
    page = reference["recipe_keys.md"]
    shown = MarkdownIt().render(page)
    assert len(describe_keys()) > 50
    for row in describe_keys():
        assert headings(page).count(f"`{row.key}`") == 1
        entry = html.unescape(
            re.sub("<.*?>", "", shown.partition(f"<h3><code>{row.key}</code></h3>")[2].split("<h3>")[0])
        )
        assert row.meaning.replace("`", "") in entry
        assert all(word in entry for word in (row.default, *row.allowed))


def test_every_command_is_explained(reference: dict[str, str]) -> None:
    """Each function that is registered as a command, alone or in a group, has a heading; and its options are there."""
    named = [f"uft {command.name or command.callback.__name__}" for command in cli.app.registered_commands]  # type: ignore
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        inner = group.typer_instance.registered_commands
        named += [f"uft {group.name} {one.name or one.callback.__name__}" for one in inner]  # type: ignore
    page = reference["commands.md"]
    assert len(named) > 15
    assert set(named) <= set(headings(page))
    plan = page.partition("## uft plan\n")[2].partition("\n## ")[0]
    assert all(option in plan for option in ("--gpu-memory", "--tokens-per-response", "--json", "uft plan [OPTIONS]"))
    assert "Compute from the model's config what a recipe needs" in plan


def test_every_exit_code_is_explained(reference: dict[str, str]) -> None:
    """Each code that ends a command, and no other, is a row with a meaning."""
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", reference["exit_codes.md"], re.MULTILINE))
    ends = {errors.UserError, errors.CheckFailed, errors.Stopped}
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {end.exit_code for end in ends} <= codes == {int(code) for code in rows}


def test_a_code_that_no_document_explains_ends_the_build(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/running.md says of exit codes cannot fall behind the program."""
    monkeypatch.setattr(errors, "EXIT_OF_A_NEW_KIND", 77, raising=False)
    with pytest.raises(ValueError, match=r"running\.md explains exit codes .*there are .*77"):
        hook.reference_pages()


class Configuration(yaml.SafeLoader):
    """mkdocs.yml names functions of Python, which only MkDocs needs."""


Configuration.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def places(navigation: Any) -> Iterator[str]:
    for entry in navigation:
        for inside in entry.values():
            yield from [inside] if isinstance(inside, str) else places(inside)


def test_every_page_has_one_place(hook: ModuleType, reference: dict[str, str]) -> None:
    """Each document, each generated page and each shipped recipe is in the navigation once, and nothing else is."""
    listed = list(places(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Configuration)["nav"]))
    written = [path.name for path in (ROOT / "docs").glob("*.md")]
    copied = [place for place in hook.ELSEWHERE.values() if place.endswith(".md")]
    recipes = ["recipes/index.md", *(f"recipes/{name}.md" for name in shipped_recipes())]
    assert sorted(listed) == sorted([*written, *copied, *recipes, *reference])


def test_a_recipe_page_says_what_the_recipe_is(hook: ModuleType) -> None:
    """The comment is text with its command, the YAML follows whole; a recipe for CPUs has no plan."""
    page = hook.recipe_pages.__globals__["recipe_page"]("quickstart_online")
    source = (ROOT / "uft_ds/recipe/shipped/quickstart_online.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0]) == yaml.safe_load(source)
    assert "Online UFT on the quickstart's tasks: the policy answers prompts" in page
    assert "<pre><code>uft train quickstart_online start.adapter=runs/quickstart\n</code></pre>" in MarkdownIt().render(
        page
    )
    assert "no plan of GPUs" in page
    assert "Planned" not in page


@pytest.mark.parametrize("checkpointing", [True, "auto"])
def test_figures_are_those_of_a_plan(
    hook: ModuleType, tiny_qwen2: Path, tmp_path: Path, checkpointing: bool | str
) -> None:
    """Memory of a GPU and of the host, and whether it fits, as `make_plan` has them; marked as planned."""
    tree = {
        "name": "x",
        "model": {"base": str(tiny_qwen2), "attention": "sdpa", "gradient_checkpointing": checkpointing},
        "data": {"sources": [{"format": "jsonl", "path": str(tmp_path / "x.jsonl")}], "max_length": 256},
        "train": {"examples_per_step": 8, "tokens_per_micro_batch": 512, "steps": 9},
        "output": str(tmp_path / "run"),
    }
    settings = settings_of(recipe_from_tree(tree, "x"))
    recipes = hook.recipe_pages.__globals__
    page = recipes["planned"]("x", settings)
    assert "Planned, not measured" in page
    planner = recipes["planner_of"](str(tiny_qwen2))
    for gpus in (1, 8):
        cluster = cluster_of(nodes=1, gpus=gpus, gpu="h100", figures=Figures(network_gbits=400))
        plan = make_plan(settings, cluster, planner=planner).outcome
        assert plan.fits
        memory = f"{in_gb(plan.gpu.total_bytes)} | {in_gb(plan.host.total_bytes)}"
        assert f"| {gpus} x {cluster.gpu.name} | yes | {memory} |" in page


def test_links_out_of_the_documents_lead_to_the_site(hook: ModuleType) -> None:
    """From where GitHub has a file to where the site has it; what is on the site already, or elsewhere, stays."""
    moved = {
        ("docs", "[a](../ds_configs/README.md#files)"): "[a](deepspeed_files.md#files)",
        ("docs", "[a](data.md#masks), [b](#here)"): "[a](data.md#masks), [b](#here)",
        ("", "[a](docs/plan.md) ![b](docs/quickstart.png)"): "[a](plan.md) ![b](quickstart.png)",
        ("ds_configs", "[a](../docs/plan.md)"): "[a](plan.md)",
        ("docs", "[a](https://arxiv.org/abs/2410.21438)"): "[a](https://arxiv.org/abs/2410.21438)",
    }
    assert {(folder, text): hook.linked_inside(text, folder) for folder, text in moved} == moved


@pytest.mark.parametrize("text", ["a * b * c <x> [y](z) _w_ |v|", "`a|b_c*` or 5 < 6 & d_e_f", "log pi(y|x) - 1"])
def test_plain_text_stays_what_it_is(hook: ModuleType, text: str) -> None:
    """In a paragraph and in the cell of a table, Markdown shows the text; what stands between backticks is code."""
    escaped = hook.reference_pages.__globals__["escaped"](text)
    for shown in (escaped if "`" not in text else "", f"| h |\n|---|\n| {escaped} |"):
        rendered = html.unescape(re.sub("<.*?>", "", MarkdownIt().enable("table").render(shown)))
        assert not shown or rendered.replace("\n", "").removeprefix("h") == text.replace("`", "")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_list_begins_after_an_empty_line(document: str) -> None:
    """GitHub needs none, the site does: without it the list is a part of the paragraph."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = text.splitlines()
    item = re.compile(r"([*-]|1\.) ")
    joined = [b for a, b in pairwise(lines) if item.match(b) and a and not re.match(r" |([*-]|\d+\.) ", a)]
    assert joined == []
