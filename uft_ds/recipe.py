"""The recipe: one strict, typed tree that holds everything that defines a run.

A recipe is a YAML file, shipped with the package or given by path, plus overrides `key.path=value`.
Inner code takes plain arguments; only the builders in `train.py` and `prepare.py` read this tree.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from uft_ds.data.example import KINDS, Kind
from uft_ds.data.formats import FORMATS
from uft_ds.errors import UserError

LossName = Literal["mse", "bce", "l1", "nll"]
LOSS_NAMES: tuple[str, ...] = get_args(LossName)
LATER_LOSSES = (
    "raw", "dpo", "cdpo", "robust", "ipo", "hinge", "rpo_sq", "rpo_fwd", "rpo_bwd", "dpop", "simpo", "orpo", "cpo",
)  # fmt: skip

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def _expand_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user; whoever reads the path says that it is not there
        return path


Location = Annotated[str, AfterValidator(_expand_home)]
"""A local path, where `~` is the home folder, or a hub name."""


class ModelSection(Section):
    base: Location
    """The base model: a local folder in Hugging Face's layout, or a hub name."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen base weights and of the activations."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """`auto`: flash_attention_2 where it is installed and a GPU is present, sdpa elsewhere."""
    chat_template: str | None = None
    """Path of a Jinja chat template, for a tokenizer that has none or another one than wanted."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    activation_offload: bool = False
    """Keep the inputs saved by gradient checkpointing in host memory."""


class LoraSection(Section):
    rank: Positive = 16
    """Rank of every adapter pair."""
    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Must be 0: with dropout the log-ratio is noise, and B = 0 hides it at the start."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get an adapter: all but the head, or a list of module names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trainable adapter weights."""


class SourceSection(Section):
    format: str
    """How a row is read: jsonl, ultrachat, helpsteer2."""
    path: Location
    """A local file or folder (json, jsonl, gz, parquet), or a hub name."""
    split: str | None = None
    """Split of a hub data set, or of the files of a folder whose names begin with it."""
    examples: Positive | None = None
    """How many responses to take, drawn by the seed; null: all."""
    score: UnitInterval | None = None
    """The score of rows that have none; null: 1 for instruction data."""


class DataSection(Section):
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest sequence, in tokens."""
    too_long: Literal["drop", "trim_prompt", "refuse"] = "drop"
    """What happens to a response that ends past max_length. A response is never cut."""
    on_bad_row: Literal["refuse", "quarantine"] = "refuse"
    """What happens to a row that cannot be read."""
    merge_conversations: bool = True
    """Keep a conversation of k assistant turns as one sequence with k responses (same loss, one forward)."""
    sources: Annotated[list[SourceSection], Field(min_length=1)]
    """The training mixture."""
    held_out: list[SourceSection] = []
    """Evaluated during and after training, never trained on."""


class ObjectiveSection(Section):
    loss: str | dict[str, str] = "mse"
    """mse (UFT), bce, l1 or nll (SFT): one name, or a map from kind."""
    beta: PositiveFloat = 0.01
    """Implicit reward per nat of log-ratio."""
    reward_shift: Literal["none", "constant", "ema", "kl", "prompt_mean"] = "none"
    """What is subtracted from the implicit reward before the sigmoid."""
    weights: float | dict[str, float] = 1.0
    """Weight of the losses: one value, or a map from kind; a kind that is not named has weight 1."""


class ReferenceSection(Section):
    mode: Literal["lockstep", "separate"] = "separate"
    """separate: a second forward with the adapters off, inside the same root call."""
    cache: bool = False
    """Keep the reference's log-probs of each response and never compute them twice."""
    adapter: str | None = None
    """A frozen adapter that, on top of the base, is the reference."""
    step_zero_tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Largest log-ratio, in nats, that is accepted before the first step. It is exactly 0 by design; GPU
    kernels that choose another algorithm without gradients may need more."""


class TrainSection(Section):
    examples_per_step: Positive = 64
    """Responses of an optimiser step, over all ranks and micro-batches."""
    tokens_per_micro_batch: Annotated[int, Field(ge=8)] = 16384
    """Most tokens that a rank forwards at once."""
    epochs: Positive = 1
    """Passes over the mixture; ignored when steps is given."""
    steps: Positive | None = None
    """Optimiser steps; the mixture is repeated as often as needed."""
    lr: PositiveFloat = 3.0e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: UnitInterval = 0.1
    """Share of all steps over which the learning rate rises linearly from 0."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the two moments. 0.95 for the second suits runs of few steps; the paper states none."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 5
    """Steps with a non-finite loss or gradient are skipped; one more than this ends the run."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order and of the adapters' initial values."""
    deterministic: bool = True
    """Use deterministic kernels only."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: Positive = 3
    """How many checkpoints are kept, the newest first."""
    evaluate_every: Positive = 100
    """Steps between evaluations of the held-out data; one always follows the last step."""


class LaunchSection(Section):
    ranks: Literal["auto"] | Positive = "auto"
    """Processes on this machine; auto: one a GPU, two on a CPU."""
    collective_timeout_minutes: PositiveFloat = 30.0
    """A rank that waits longer than this for the others ends the run."""


class Recipe(Section):
    name: str
    """Name of the run."""
    model: ModelSection
    lora: LoraSection | None = LoraSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    tracking: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl."""
    deepspeed: str = "zero3"
    """A file of ds_configs/ by name, or a path to a DeepSpeed JSON."""
    output: Annotated[Location, Field(min_length=1)]
    """The run's folder."""

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        problems = [f"{key}: {problem}" for key, problem in _impossible(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def loss_of(self, kind: Kind) -> str:
        """The loss of one kind of responses.

        A map need not name kinds that the data does not hold (checked when it is prepared): any loss does for them.
        """
        loss = self.objective.loss
        return loss if isinstance(loss, str) else loss.get(kind, next(iter(loss.values())))

    def weight_of(self, kind: Kind) -> float:
        """The weight of one kind's loss."""
        weights = self.objective.weights
        return weights if isinstance(weights, float | int) else weights.get(kind, 1.0)


def _impossible(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, problem) of everything that no single field can know, unavailable options included."""
    found: list[tuple[str, str]] = []
    data, train, objective, reference = recipe.data, recipe.train, recipe.objective, recipe.reference
    if data.max_length > train.tokens_per_micro_batch:
        found.append(
            (
                "train.tokens_per_micro_batch",
                f"{train.tokens_per_micro_batch} is less than data.max_length {data.max_length}: "
                "a sequence would not fit; raise it or lower data.max_length",
            )
        )
    seen: set[tuple[str, str | None]] = set()
    for prefix, sources in (("data.sources", data.sources), ("data.held_out", data.held_out)):
        for index, source in enumerate(sources):
            if (source.path, source.split) in seen:
                found.append(
                    (f"{prefix}.{index}.path", f"{source.path!r} is a source already; no row may be used twice")
                )
            seen.add((source.path, source.split))
    if recipe.lora is not None and recipe.lora.dropout != 0.0:
        found.append(("lora.dropout", f"{recipe.lora.dropout} given, must be 0: it would make log-ratios noise"))
    for prefix, sources in (("data.sources", data.sources), ("data.held_out", data.held_out)):
        for index, source in enumerate(sources):
            if source.format not in FORMATS:
                found.append((f"{prefix}.{index}.format", _unknown(source.format, tuple(FORMATS))))
    if isinstance(objective.loss, dict):
        found += [("objective.loss", _unknown(kind, KINDS)) for kind in objective.loss if kind not in KINDS]
        missing = [kind for kind in ("instruction", "score") if kind not in objective.loss]
        if missing:
            found.append(("objective.loss", f"no loss for kind {missing[0]!r}; name one for each kind"))
    losses = objective.loss.values() if isinstance(objective.loss, dict) else [objective.loss]
    for name in losses:
        if name in LATER_LOSSES:
            found.append(("objective.loss", f"{name!r} is not available in this version; use {', '.join(LOSS_NAMES)}"))
        elif name not in LOSS_NAMES:
            found.append(("objective.loss", _unknown(name, LOSS_NAMES)))
    weights = objective.weights if isinstance(objective.weights, dict) else {"instruction": objective.weights}
    for kind, weight in weights.items():
        if kind not in KINDS:
            found.append(("objective.weights", _unknown(kind, KINDS)))
        if not (math.isfinite(weight) and weight >= 0):
            found.append(("objective.weights", f"{weight} given, must be finite and >= 0"))
    return found + [
        (key, f"{given!r} is not available in this version; use {instead}")
        for key, given, unavailable, instead in (
            ("lora", recipe.lora, recipe.lora is None, "adapters: the reference is the base without them"),
            ("model.activation_offload", True, recipe.model.activation_offload, "false"),
            ("data.too_long", data.too_long, data.too_long == "trim_prompt", "drop or refuse"),
            ("data.on_bad_row", data.on_bad_row, data.on_bad_row == "quarantine", "refuse"),
            ("objective.reward_shift", objective.reward_shift, objective.reward_shift != "none", "none"),
            ("reference.mode", reference.mode, reference.mode == "lockstep", "separate"),
            ("reference.cache", reference.cache, reference.cache, "false"),
            ("reference.adapter", reference.adapter, reference.adapter is not None, "null"),
        )
        if unavailable
    ]


def _unknown(given: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown name {given!r}; {hint}allowed: {', '.join(known)}"


class _RecipeLoader(yaml.SafeLoader):
    """YAML without two traps: `1e-5` is a number, and a key given twice is an error."""


class _RecipeDumper(yaml.SafeDumper):
    """Quotes the texts that `_RecipeLoader` would take for numbers."""


for _class in (_RecipeLoader, _RecipeDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
        list("-+0123456789."),
    )


def _mapping_without_duplicates(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word, found {key!r}")
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader
    except ValueError as error:  # it looks like a date or a number, but is none: 2024-02-30
        raise yaml.YAMLError(str(error)) from None


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("uft_ds") / "recipes"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml")))


def _read_recipe(name_or_path: str) -> tuple[str, str]:
    """(label, text) of a shipped recipe or a file."""
    if name_or_path in shipped_recipes():
        file = resources.files("uft_ds") / "recipes" / f"{name_or_path}.yaml"
        return name_or_path, file.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise UserError(f"recipe: {_unknown(name_or_path, shipped_recipes())}, or a path to a YAML file")
    try:
        return name_or_path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name_or_path}: cannot be read ({error})") from None


def _apply_override(tree: Any, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected key.path=value, such as train.lr=1e-5")
    try:
        value = _load_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML") from None
    except UserError as error:
        raise UserError(f"override {override!r}: {error}") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, part in enumerate([*parents, leaf]):
        where = ".".join(key.split(".")[: depth + 1])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                known = f"expected an index from 0 to {len(node) - 1}" if node else "the list is empty"
                raise UserError(f"override {override!r}: {where}: {known}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise UserError(f"override {override!r}: {where}: its parent is {node!r} and has no keys")
        if depth == len(parents):
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
        tree = _load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"recipe {label}{line}: not valid YAML: {problem}") from None
    except UserError as error:
        raise UserError(f"recipe {label}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {label}: expected keys and values, found {type(tree).__name__}")
    try:
        for override in overrides:
            _apply_override(tree, override)
    except UserError as error:
        raise UserError(f"recipe {label}: {error}") from None
    return recipe_from_tree(tree, label)


def recipe_from_tree(tree: dict[str, Any], label: str) -> Recipe:
    """Validate a recipe that is already a tree of plain values."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(problem).splitlines()]
        raise UserError("\n".join(f"recipe {label}: {problem}" for problem in problems)) from None


def _explain(problem: Any) -> str:
    # Members of a union put their type's name into the location; only keys and indices name a place.
    path = [
        part
        for part in problem["loc"]
        if not (isinstance(part, str) and re.search(r"[\[\]-]|^(str|int|float|dict)$", part))
    ]
    if problem["type"] == "extra_forbidden":
        unknown = str(problem["loc"][-1])  # the user's own word, which may look like a type's name
        path = [*path, unknown] if not path or path[-1] != unknown else path
        near = difflib.get_close_matches(unknown, _known_keys(path[:-1]), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_known_keys(path[:-1]))}"
        return f"{'.'.join(str(part) for part in path)}: unknown key; {hint}"
    key = ".".join(str(part) for part in path)
    if problem["type"] == "missing":
        return f"{key}: required, but not given"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {problem['input']!r} given; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(path: list[Any]) -> list[str]:
    section: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section inside a field's type: itself, or a member of its union or list."""
    nested = [a for arg in get_args(annotation) for a in get_args(arg)]
    candidates = (annotation, *get_args(annotation), *nested)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal value."""
    tree = recipe.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=False, width=110)


def describe_keys(section: type[Section] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every leaf, in the order of a recipe; sources' keys stand under index 0."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            is_list = get_origin(field.annotation) is list
            rows += describe_keys(inner, f"{prefix}{name}.{'0.' if is_list else ''}")
        else:
            default = "(required)" if field.is_required() else yaml.safe_dump(field.default).split("\n...")[0].strip()
            rows.append((prefix + name, default, " ".join((field.description or "").split())))
    return rows
