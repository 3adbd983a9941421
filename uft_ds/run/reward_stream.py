"""The reward model that an online run attaches to its own base: which one it is, and whether it may be.

`score_by: reward:FOLDER` names either a model of its own, which transformers opens (`scoring/reward.py`), or the
adapter of a reward model that was trained on the run's base. This module knows the second kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uft_ds.checkpoint.folder import run_of_adapter
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.padding import is_saved_for_scoring
from uft_ds.errors import UserError
from uft_ds.export.source import recorded_identity
from uft_ds.recipe.settings import Settings
from uft_ds.streams.adapter_files import CONFIG
from uft_ds.streams.identity import adapter_identity
from uft_ds.streams.policy import Policy, adapted
from uft_ds.streams.reward_adapter import add_reward_adapter
from uft_ds.streams.stream import REWARD, SCORING, Stream

_KIND = "reward:"


@dataclass(frozen=True)
class RewardModel:
    """folder: of its adapter. key: the recipe's key that names it first. sources: the numbers of those it scores."""

    folder: Path
    key: str
    sources: tuple[int, ...]

    @property
    def name(self) -> str:
        """What people call it: the run and the checkpoint, or the folder."""
        run = run_of_adapter(self.folder)
        return self.folder.name if run is None else f"{run.path.name}/{self.folder.parent.name}"

    def identity(self, settings: Settings) -> dict[str, Any]:
        """All that its values depend on besides the base, which the run's identity holds, and the answers."""
        return {
            "scorer": f"{_KIND}{self.name}",
            "adapter": adapter_identity(self.folder, self.key),
            "dtype": settings.model.dtype,
            "adapter_dtype": settings.adapters.dtype,
        }


def reward_model_of(settings: Settings) -> RewardModel | None:
    """The reward model that scores on the policy's base; None if there is none, or another run has recorded all scores.

    Args:
        settings: with absolute paths, as `located` returns them.
    Raises:
        UserError: two sources name two of them.
    """
    if settings.generator.by == "recorded":
        return None
    found: dict[Path, list[int]] = {}
    for number, scorer in enumerate(settings.scorers):
        if scorer is not None and scorer.by.startswith(_KIND):
            folder = Path(scorer.by.removeprefix(_KIND))
            if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
                found.setdefault(folder, []).append(number)
    if not found:
        return None
    (folder, numbers), *others = found.items()
    for other, (number, *_) in others:
        raise UserError(
            f"{_key(number)}: {_KIND}{other}: {_key(numbers[0])} names another reward model, {folder}; a run attaches "
            "one to its base: give one of them as a model of its own, which `uft convert RUN FOLDER --to reward-model` "
            "writes"
        )
    return RewardModel(folder, _key(numbers[0]), tuple(numbers))


def _key(number: int) -> str:
    return f"data.sources.{number}.score_by"


def with_reward_adapter(policy: Policy, settings: Settings) -> dict[str, Tensor]:
    """Attach the run's reward model, if it has one, to the policy's base; see `add_reward_adapter`.

    Returns:
        Its head by the name of its stream, as `UFTModel` takes it; empty if there is none.
    """
    reward = reward_model_of(settings)
    if reward is None:
        return {}
    dtype = getattr(torch, settings.adapters.dtype)
    return {SCORING.name: add_reward_adapter(adapted(policy), reward.folder, reward.key, dtype=dtype)}


def further_streams(settings: Settings, heads: Mapping[str, Tensor]) -> tuple[Stream, ...]:
    """The streams of a run besides policy and reference. heads: as `with_reward_adapter` returns them."""
    if settings.trains_head:
        return (REWARD,)
    return (SCORING,) if heads else ()


def check_reads_the_same_text(reward: RewardModel, chat: ChatTokenizer) -> None:
    """Refuse a reward model that was trained on other tokens than the policy writes: it would read another text.

    Args:
        chat: the policy's tokenizer and chat template.
    Raises:
        UserError: they differ, or the reward model's are not known.
    """
    run = run_of_adapter(reward.folder)
    if run is not None:
        is_same, whose = recorded_identity(run)[1] == chat.content_hash, f"the run {run.path}"
    else:
        try:
            is_same, whose = is_saved_for_scoring(chat, reward.folder), str(reward.folder)
        except UserError:
            raise UserError(
                f"{reward.key}: {reward.folder}: holds no tokenizer, so whether the reward model reads the policy's "
                "tokens is not known; give the run that trained it, or what `uft convert RUN FOLDER --to adapter` "
                "writes"
            ) from None
    if not is_same:
        raise UserError(
            f"{reward.key}: {whose} has another tokenizer or chat template than the policy, by their content: a reward "
            "model on the policy's base reads the policy's own tokens; give the policy the same model.chat_template, "
            "or give the reward model as a model of its own, by `uft convert RUN FOLDER --to reward-model`"
        )


def reward_identity(settings: Settings) -> Mapping[str, str]:
    """The part of a run's identity that names its reward model; empty if there is none."""
    reward = reward_model_of(settings)
    return {} if reward is None else {"reward": adapter_identity(reward.folder, reward.key)}
