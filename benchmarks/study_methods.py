"""The methods that the study compares: what each one's last stage reads, and by which loss it learns.

Not a benchmark itself: a part of benchmarks/study.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """How a method's last stage is trained.

    sources: names of files of data, each with its share. after_sft: whether it goes on from the shared first stage,
    which is then its reference. online: whether the policy answers itself. own_answers: whether it learns from answers
    that the first stage's policy has given.
    """

    label: str
    sources: Mapping[str, float]
    loss: Any
    after_sft: bool = False
    online: bool = False
    own_answers: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method("SFT", {"instruction": 1.0}, "nll"),
    "sft_dpo": Method("SFT -> DPO", {"pairs": 1.0}, {"pair": "dpo", "instruction": "nll"}, after_sft=True),
    "sft_kto": Method("SFT -> KTO", {"split": 1.0}, "l1", after_sft=True, more={"objective.reward_shift": "kl"}),
    "sft_una": Method("SFT -> UNA", {"scored": 1.0}, "mse", after_sft=True),
    "sft_rloo": Method(
        "SFT -> RLOO",
        {"prompts": 1.0},
        {"score": "rloo", "instruction": "nll"},
        after_sft=True,
        online=True,
        more={"objective.beta": {"score": 0.01}, "objective.center": "none"},
    ),
    "sft_uft_online": Method(
        "SFT -> UFT online, centred",
        {"prompts": 1.0},
        "mse",
        after_sft=True,
        online=True,
        more={"objective.center": "prompt"},
    ),
    "sft_uft_plain": Method(
        "SFT -> UFT online, plain",
        {"prompts": 1.0},
        "mse",
        after_sft=True,
        online=True,
        more={"objective.center": "none"},
    ),
    "sft_uft_own": Method(
        "SFT -> UFT on its own answers",
        {},
        "mse",
        after_sft=True,
        own_answers=True,
        more={"objective.center": "prompt"},
    ),
    "una": Method("UNA", {"scored": 1.0}, "mse"),
    "uft": Method("UFT", {"instruction": 0.4, "scored": 0.6}, "mse"),
    "uft_online": Method(
        "UFT online", {"instruction": 0.4, "prompts": 0.6}, "mse", online=True, more={"objective.center": "prompt"}
    ),
}
