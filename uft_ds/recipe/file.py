"""Read recipes from YAML files, and apply overrides `key.path=value`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text
from uft_ds.host.formats import check_format
from uft_ds.recipe.explaining import SHOWN_LETTERS, explained, shown
from uft_ds.recipe.names import KEYS_MEAN, NULL_MEANS, unknown_name
from uft_ds.recipe.schema import COMBINATIONS_CHECKED, Recipe

_DIGITS = 9
"""Most digits of an index into a list."""
_LETTERS_OF_A_NUMBER = 1000
"""Most letters of a whole number: Python refuses to show one of more than 4300 digits, even in an error."""
FORMAT_KEY, FORMAT = "recipe_format", 1
"""Key and version of the recipe that a run keeps in its folder. Users need not write the key in their recipes."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_OF_YAML_1_2 = (
    (_INT, re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
)
"""(tag, pattern, first letters) of numbers, as YAML 1.2 reads them, and with `_` between digits.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90 (a count of 60), and `1e-5` is a text. Here these are 10, a
text, which no number's key takes, and a number.
"""


_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""NUL, and halves of surrogate pairs."""


class _RecipeLoader(yaml.SafeLoader):
    """YAML without the pitfalls of version 1.1 in numbers, and in which a key given twice is an error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; one that does not fit its tag (`!!bool maybe`, 2024-02-30) is an error of the YAML.

        So is a text that can neither name a file nor be written to one.
        """
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            what = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a value"
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise ConstructorError(None, None, f"{what} is no {kind}{reason}", node.start_mark) from None
        if isinstance(value, str) and _UNWRITABLE.search(value):
            problem = f"{shown(value)}: a text must not hold \\0, nor \\ud800 to \\udfff"
            raise ConstructorError(None, None, problem, node.start_mark)
        return value


class _RecipeDumper(yaml.SafeDumper):
    """Writes texts in quotes that `_RecipeLoader`, or a reader of YAML 1.1, would read as something else."""


def _int(loader: _RecipeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > _LETTERS_OF_A_NUMBER:
        raise ValueError(f"{len(text)} letters, at most {_LETTERS_OF_A_NUMBER} are read")
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_constructor(_INT, _int)
for _class in (_RecipeLoader, _RecipeDumper):
    for _tag, _pattern, _letters in _OF_YAML_1_2:
        _class.add_implicit_resolver(_tag, _pattern, list(_letters))


def _mapping_without_duplicates(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word, found {key!r}")
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def load_yaml(text: str) -> Any:
    """Read YAML as plain values.

    Raises:
        yaml.YAMLError: the text is not YAML.
        UserError: a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that are part of the package."""
    folder = resources.files("uft_ds") / "recipe" / "shipped"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml")))


def described_recipes() -> dict[str, str]:
    """The name of each shipped recipe, and the comment in its first line."""
    texts = {name: _read_recipe(name)[1] for name in shipped_recipes()}
    return {name: text.splitlines()[0].removeprefix("#").strip() for name, text in texts.items()}


def _read_recipe(name_or_path: str) -> tuple[str, str]:
    """(label, text) of a shipped recipe or a file."""
    if name_or_path in shipped_recipes():
        file = resources.files("uft_ds") / "recipe" / "shipped" / f"{name_or_path}.yaml"
        return name_or_path, file.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise UserError(f"recipe: {unknown_name(name_or_path, shipped_recipes())}, or a path to a YAML file")
    return name_or_path, read_yaml_file(path, f"recipe {name_or_path}", shipped_recipes())


def read_yaml_file(path: Path, label: str, shipped: Iterable[str]) -> str:
    """The text of a file that the user names.

    Args:
        label: what messages call it. shipped: names that may be given instead of a path.
    Raises:
        UserError: it is not there, with the nearest name that is, or it cannot be read.
    """
    try:
        # The shell's `<(...)` is a pipe that ends; a named pipe may never have a writer.
        is_of_shell = str(path).startswith(("/dev/fd/", "/proc/self/fd/"))
        return path.read_text(encoding="utf-8") if is_of_shell else read_regular_text(path)
    except FileNotFoundError:
        there = [str(path.with_name(other.name)) for other in _yaml_files(path.parent)]
        near = difflib.get_close_matches(str(path), there, n=1) or difflib.get_close_matches(path.stem, shipped, n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped)}"
        folder = "" if path.parent.is_dir() else f" ({path.parent} is no folder)"
        raise UserError(f"{label}: no such file{folder}; {hint}") from None
    except IsADirectoryError:
        inside = _yaml_files(path)
        hint = f"; it holds {', '.join(file.name for file in inside[:3])}" if inside else ""
        raise UserError(f"{label}: is a folder, expected a YAML file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror or error})") from None


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _apply_override(tree: Any, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {shown(override)}: expected key.path=value, such as train.lr=1e-5")
    if _UNWRITABLE.search(key):
        raise UserError(f"override {shown(override)}: a key must not hold \\0, nor \\ud800 to \\udfff")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        problem = f" ({error.problem})" if isinstance(error, ConstructorError) else ""
        raise UserError(f"override {shown(override)}: the value is not YAML{problem}") from None
    except UserError as error:
        raise UserError(f"override {shown(override)}: {error}") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, part in enumerate([*parents, leaf]):
        where = ".".join(key.split(".")[: depth + 1])[:SHOWN_LETTERS]
        if isinstance(node, list):
            if not part.isdecimal() or len(part) > _DIGITS or int(part) >= len(node):
                known = f"expected an index from 0 to {len(node) - 1}" if node else "the list is empty"
                raise UserError(f"override {shown(override)}: {where}: {known}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            parent = ".".join(key.split(".")[:depth])
            is_shown = depth == len(parents) and len(text) < SHOWN_LETTERS and text.isprintable()
            whole = f"{parent}={{{part}: {text if is_shown else '...'}}}"
            if node is None and parent in NULL_MEANS:
                raise UserError(
                    f"override {shown(override)}: {where}: the recipe has {parent}: null, so {NULL_MEANS[parent]}; "
                    f"{whole} makes it a run in which {KEYS_MEAN[parent]}"
                )
            raise UserError(
                f"override {shown(override)}: {where}: its parent is {shown(node)} and has no keys; give the whole "
                f"of it, {whole}"
            )
        if depth == len(parents):
            # A map at the top level would replace a whole section, when most often only some keys of it are meant.
            if depth == 0 and isinstance(value, dict) and isinstance(node.get(index), dict):
                given = next(iter(value), "key")
                raise UserError(
                    f"override {shown(override)}: it would replace all of {index}; give its keys one by one, such as "
                    f"{index}.{given}=..."
                )
            node[index] = value
        elif isinstance(node, dict):
            node = node.setdefault(index, {})
        else:
            node = node[index]


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Raises:
        UserError: names the recipe and the key, what was given, what is allowed and the nearest known name.
    """
    label, text = _read_recipe(name_or_path)
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"recipe {label}{line}: not valid YAML: {problem}") from None
    except UserError as error:
        raise UserError(f"recipe {label}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {label}: expected keys and values, found {type(tree).__name__}")
    if FORMAT_KEY in tree:
        _set_what_was_no_key(tree)
    remedy = f"start from the recipe that you wrote, which needs no {FORMAT_KEY}"
    check_format(f"recipe {label}", tree.pop(FORMAT_KEY, None), FORMAT, remedy)
    try:
        for override in overrides:
            _apply_override(tree, override)
    except UserError as error:
        raise UserError(f"recipe {label}: {error}") from None
    return recipe_from_tree(tree, label)


def _set_what_was_no_key(tree: dict[str, Any]) -> None:
    """Give a stored recipe of an earlier version what its run did, where today's default does something else."""
    data = tree.get("data")
    if isinstance(data, dict):
        data.setdefault("share_prompts", False)


def recipe_from_tree(tree: dict[str, Any], label: str, *, checks_combinations: bool = True) -> Recipe:
    """Validate a recipe given as a tree of plain values.

    Args:
        label: the recipe's name in messages.
        checks_combinations: check also that the keys are compatible with each other.
    Raises:
        UserError: one line for each wrong key.
    """
    try:
        return Recipe.model_validate(tree, context=None if checks_combinations else COMBINATIONS_CHECKED)
    except ValidationError as error:
        raise UserError("\n".join(f"recipe {label}: {line}" for line in explained(error, Recipe))) from None


def read_stored_recipe(path: Path) -> dict[str, Any]:
    """Read what `stored_recipe` wrote, as plain values. Keys that were added later get what runs did without them.

    Raises:
        UserError: the file cannot be read, or is not of this format version.
    """
    return load_recipe(str(path)).model_dump(mode="json")


def dump_value(value: Any) -> str:
    """A value in one line of YAML, as an override gives it; `load_yaml` reads it back to an equal value."""
    text = yaml.dump(value, Dumper=_RecipeDumper, default_flow_style=True, width=10**9)
    return text.removesuffix("...\n").strip()


def said(value: Any) -> str:
    """A value in a sentence: nothing is `none`, and a text has no quotes."""
    return "none" if value is None else value if isinstance(value, str) else dump_value(value)


def dump_recipe(recipe: Recipe | Mapping[str, Any]) -> str:
    """A recipe, or its tree, as YAML. `load_recipe` reads it back to an equal value."""
    tree = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else dict(recipe)
    return yaml.dump(tree, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=False, width=110)


def stored_recipe(recipe: Recipe | Mapping[str, Any]) -> str:
    """The recipe as a run stores it: the format version, then `dump_recipe`."""
    return f"{FORMAT_KEY}: {FORMAT}\n{dump_recipe(recipe)}"


def leaves_of(value: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of a recipe by their dotted keys."""
    tree = value.model_dump(mode="json") if isinstance(value, Recipe) else value
    if not isinstance(tree, Mapping | list):
        return {prefix.removesuffix("."): tree}
    leaves: dict[str, Any] = {}
    for key, inner in enumerate(tree) if isinstance(tree, list) else tree.items():
        leaves |= leaves_of(inner, f"{prefix}{key}.")
    return leaves
