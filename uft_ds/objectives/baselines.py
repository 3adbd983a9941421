"""What the responses of a micro-batch are compared with: shifts of rewards, centred targets, advantages.

Some of it is a mean log-ratio over a group of responses (`groups`). If the whole group lies in the micro-batch, the
mean is taken from the very forward that trains; else it has been computed ahead, by a forward of its own.

R responses of a micro-batch, G groups that lie wholly in it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Baselines:
    """What the losses of a micro-batch compare rewards with: [responses] each, float32, without gradient.

    shifts_R: subtracted from the rewards of pointwise losses.
    targets_R: what a pointwise loss compares the shifted reward with: the score, or for a centred response
        1/2 + score - mean score of its group, which may leave [0, 1].
    advantages_R: the factor of a policy gradient loss; for a centred response its target - 1/2; NaN for the others.
    """

    shifts_R: Tensor
    targets_R: Tensor
    advantages_R: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, in the order of the fields."""
        return self.shifts_R, self.targets_R, self.advantages_R


@dataclass(frozen=True)
class Compared:
    """`Baselines` but for the log-ratios of the micro-batch itself, which only its forward gives; [responses] each.

    shifts_R, targets_R: float32, as in `Baselines`; the shift without the mean of a group.
    of_scores_R: float64, the part of the advantage that depends on scores alone; NaN without an advantage.
    shift_factors_R: float64, what multiplies the group's mean log-ratio in the shift; 0 if nothing does.
    kl_factors_R: float64, what multiplies log-ratio - the group's mean in the advantage; 0 if nothing does.
    group_of_R: int64, the response's group among those that lie wholly in this micro-batch; G for no such group.
    sizes_G: [groups + 1], float64, number of responses; the last is 1, for no group.
    ahead_R: float64, nats, the mean log-ratio of a group that was forwarded ahead; 0 for other responses.
    """

    shifts_R: Tensor
    targets_R: Tensor
    of_scores_R: Tensor
    shift_factors_R: Tensor
    kl_factors_R: Tensor
    group_of_R: Tensor
    sizes_G: Tensor
    ahead_R: Tensor

    def to(self, device: torch.device | str) -> Compared:
        """The same on another device."""
        moved: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)
        }
        return replace(self, **moved)

    def with_log_ratios(self, log_ratios_R: Tensor) -> Baselines:
        """The baselines of the forwarded micro-batch. Nothing in here waits for the device.

        Args:
            log_ratios_R: [responses], nats (per token if lengths are normalised). Its gradient is not followed: a
                baseline has none.
        """
        ratios_R = log_ratios_R.detach().double()
        sums_G = torch.zeros_like(self.sizes_G).index_add(0, self.group_of_R, ratios_R)
        is_here_R = self.group_of_R < len(self.sizes_G) - 1
        means_R = torch.where(is_here_R, (sums_G / self.sizes_G)[self.group_of_R], self.ahead_R)
        # A factor of 0 must not make NaN of another response's log-ratio that is not finite.
        zero_R = torch.zeros_like(means_R)
        moved_R = torch.where(self.shift_factors_R != 0, self.shift_factors_R * means_R, zero_R)
        penalty_R = torch.where(self.kl_factors_R != 0, self.kl_factors_R * (ratios_R - means_R), zero_R)
        return Baselines(
            (self.shifts_R + moved_R).float(),
            self.targets_R,
            (self.of_scores_R - penalty_R).float(),
        )
