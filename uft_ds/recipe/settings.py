"""The settings of a run: frozen plain values, which all modules below `run/` get instead of the recipe.

`to_settings.py` makes them of a recipe, without reading the disk. Values that need it (absolute paths, an adapter's
folder, a hub model's commit, the DeepSpeed file) are filled in by `run/settings.py` before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uft_ds.data.sources import SourceSettings, Tolerance
from uft_ds.host.files import user_cache
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.reference import HowForwarded, HowReference, how_known
from uft_ds.recipe.rules import GivenObjective


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base model and how it is forwarded.

    logits_bytes: memory for the logits of both streams at one time; None: chosen for the device.
    """

    base: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    attention: str
    chat_template: str | None
    gradient_checkpointing: bool | Literal["selective", "auto"]
    activation_offload: bool
    logits_bytes: int | None


@dataclass(frozen=True)
class LoraSettings:
    """The adapters. targets: names of modules, or "all-linear". experts: whether routed experts get adapters too."""

    rank: int
    alpha: float
    targets: Literal["all-linear"] | list[str]
    dtype: Literal["float32", "bfloat16"]
    experts: bool = False


@dataclass(frozen=True)
class DataSettings:
    """The data. given_cache_dir: the recipe's value; None: the default."""

    max_length: int
    tolerance: Tolerance
    workers: int | None
    given_cache_dir: str | None
    share_prompts: bool
    sources: tuple[SourceSettings, ...]
    held_out: tuple[SourceSettings, ...]

    @property
    def cache_dir(self) -> Path:
        """The folder in which runs share tokenised sources."""
        return Path(self.given_cache_dir) if self.given_cache_dir else user_cache() / "tokenized"


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference.

    is_needed: whether any loss compares with the reference.
    given_mode, given_cache, given_cache_dir: the recipe's values, whether the reference is needed or not.
    """

    is_needed: bool
    given_mode: HowForwarded
    given_cache: bool
    given_cache_dir: str | None
    adapter: str | None
    step_zero_tolerance: float

    @property
    def mode(self) -> HowForwarded:
        """How the reference is forwarded; "separate" if it is not needed, which leaves the model unchanged."""
        return self.given_mode if self.is_needed else "separate"

    @property
    def caches(self) -> bool:
        """Whether the reference is needed and its log-probs are cached."""
        return self.how == "cached"

    @property
    def how(self) -> HowReference:
        """How the run gets the reference's log-probs."""
        return how_known(needed=self.is_needed, cached=self.given_cache, forwarded=self.given_mode)

    @property
    def cache_dir(self) -> Path:
        """The folder in which runs share the reference's log-probs."""
        return Path(self.given_cache_dir) if self.given_cache_dir else user_cache() / "reference"


@dataclass(frozen=True)
class TrainSettings:
    """The recipe's `train`, with the same keys."""

    examples_per_step: int
    tokens_per_micro_batch: int
    epochs: int
    steps: int | None
    lr: float
    head_lr: float | None
    schedule: Literal["cosine", "linear", "constant"]
    warmup: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    max_skipped_steps: int
    seed: int
    deterministic: bool
    checkpoint_every: int
    keep_checkpoints: int
    keep_best: str | None
    evaluate_every: int
    samples: int
    sample_tokens: int

    @property
    def head_rate_scale(self) -> float:
        """The learning rate of a reward model's head, as a factor of the adapters'."""
        return 1.0 if self.head_lr is None else self.head_lr / self.lr


@dataclass(frozen=True)
class JudgeSettings:
    """The recipe's `judge` of a scorer, with the same keys."""

    url: str
    model: str
    key_env: str | None
    question: str | None
    scale: tuple[float, float]
    body: str | None
    requests_per_minute: float | None
    concurrency: int
    timeout_seconds: float
    tries: int
    max_cost: float | None
    price: tuple[float, float] | None


@dataclass(frozen=True)
class ScorerSettings:
    """The recipe's `score_by` of an online source. rule: its `map`."""

    by: str
    rule: str | None
    seconds: float
    workers: int | None
    judge: JudgeSettings | None


@dataclass(frozen=True)
class TaskSettings:
    """A task of the recipe's `evaluate.tasks`, with the same keys. scorer: its `score_by`."""

    name: str
    path: str
    split: str | None
    columns: tuple[tuple[str, str | None], ...]
    examples: int | None
    scorer: ScorerSettings
    max_new_tokens: int


@dataclass(frozen=True)
class GeneratorSettings:
    """The recipe's `generator`, with the same keys."""

    by: Literal["builtin", "vllm", "recorded"]
    url: str | None
    served_model: str | None
    key_env: str | None
    run: str | None
    temperature: float
    top_p: float
    max_new_tokens: int
    truncated: Literal["score", "zero", "drop"]
    max_dropped: float
    max_kl: float | None
    tokens_at_once: int
    concurrency: int
    timeout_seconds: float
    patience_minutes: float


@dataclass(frozen=True)
class LaunchSettings:
    """How ranks are started.

    ranks: number of processes on this machine, or "auto". sequence_parallel: how many of them share sequences.
    """

    ranks: Literal["auto"] | int
    sequence_parallel: int
    collective_timeout_minutes: float


@dataclass(frozen=True)
class DeepSpeedSettings:
    """The DeepSpeed configuration.

    name: the name of a file in ds_configs/, or a path.
    config: the content of the file; None until `run/settings.py` has read and checked it.
    """

    name: str
    config: Mapping[str, Any] | None = None

    @property
    def checked(self) -> dict[str, Any]:
        """The content of the file, which must have been read before."""
        assert self.config is not None, "run/settings.py reads it first"
        return dict(self.config)


@dataclass(frozen=True)
class Settings:
    """All settings that define a run.

    start_adapter: the recipe's `start.adapter`.
    scorers: of each training source; None for one whose rows hold responses, and where all scores are recorded.
    given: the objective exactly as the recipe gives it, for messages.
    stored: the recipe as a tree of plain values. It is written to the run's recipe.yaml, and a resumed run is compared
        with it.
    """

    name: str
    output: Path
    model: ModelSettings
    lora: LoraSettings | None
    """None: all parameters are trained."""
    data: DataSettings
    objective: Objective
    given: GivenObjective
    reference: ReferenceSettings
    start_adapter: str | None
    generator: GeneratorSettings
    scorers: tuple[ScorerSettings | None, ...]
    tasks: tuple[TaskSettings, ...]
    train: TrainSettings
    launch: LaunchSettings
    tracking: tuple[str, ...]
    deepspeed: DeepSpeedSettings
    stored: Mapping[str, Any]

    @property
    def trains_head(self) -> bool:
        """Whether the run trains a reward model: adapters and a scalar head."""
        return self.objective.reward == "head"

    @property
    def trains_all(self) -> bool:
        """Whether all parameters are trained, without adapters."""
        return self.lora is None

    @property
    def copies_reference(self) -> bool:
        """Whether a frozen copy of the base stays beside the trained one: a step needs the weights of the reference.

        `reward_shift: kl` forwards it for mismatched prompts, which no cache holds.
        """
        is_forwarded = self.reference.how == "separate" or self.objective.shift.name == "kl"
        return self.trains_all and self.reference.is_needed and is_forwarded

    @property
    def adapters(self) -> LoraSettings:
        """The adapters of a run that trains some."""
        assert self.lora is not None, "a run that trains all parameters has no adapters"
        return self.lora

    @property
    def is_online(self) -> bool:
        """Whether the policy answers prompts during the run, or trains on answers that another run has recorded."""
        return any(source.asked is not None for source in self.data.sources)
