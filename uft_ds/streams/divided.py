"""Rows divided over ranks: each computes a part of the tokens, and attention sees all of them (Ulysses, 2309.14509).

Embedding, norms, linear layers and head work token by token, so a rank computes them for its own part of a row. Before
the attention the ranks exchange: each gives away the tokens of the heads that others compute, and gets all tokens of
its own heads; after it they exchange back. The attention itself is that of an undivided row, with fewer heads: segments
and shared prompts may cross the borders between parts. DeepSpeed's own exchange (0.19.8) drops masks of four dimensions
under sdpa, so that packed sequences would attend to each other.

Log-probs of tokens are put together afterwards, so that all ranks of a group compute the same loss. Each rank's
gradient is then what its own tokens contribute, and their sum is the gradient.

S ranks of a group, T tokens of a row padded to a multiple of S, H heads, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

PACKED = "packed"
"""Name of the attention of packed rows in transformers, and in `model.attention`."""


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that share rows, seen from one of them. group: torch's; rank, size: in it."""

    group: Any
    rank: int
    size: int

    def padded(self, num_tokens: int) -> int:
        """The number of tokens of a row that all ranks have equally many of."""
        return -(-num_tokens // self.size) * self.size

    def own(self, row_T: Tensor) -> Tensor:
        """This rank's part of a row: [T / S]. Zeros follow its last token."""
        own = self.padded(len(row_T)) // self.size
        part_t = row_T[self.rank * own : (self.rank + 1) * own]
        return torch.nn.functional.pad(part_t, (0, own - len(part_t)))

    def own_places(self, places_N: np.ndarray, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of some places in a row are in this rank's part.

        Args:
            places_N: on the host. Chosen on a GPU they would have a number that the host has to wait for.
        Returns:
            on the device: their indices among the given ones, and the places counted from the part's first token.
        """
        own = self.padded(num_tokens) // self.size
        first = self.rank * own
        index_n = np.flatnonzero((places_N >= first) & (places_N < first + own))
        index, places = map(torch.from_numpy, (index_n, places_N[index_n] - first))
        return index.to(device, non_blocking=True), places.to(device, non_blocking=True)

    def own_heads(self, part: Tensor) -> Tensor:
        """From its own tokens of all heads, [1, H, T / S, d], to all tokens of its own heads, [1, H / S, T, d]."""
        _, heads, own, size = part.shape
        given = part.reshape(self.size, heads // self.size, own, size)
        found = _exchanged(given, self.group)  # the first dimension: whose tokens they are
        return found.transpose(0, 1).reshape(1, heads // self.size, self.size * own, size)

    def own_tokens(self, output: Tensor) -> Tensor:
        """From all tokens of its own heads, [1, T, H / S, d], to its own tokens of all heads, [1, T / S, H, d]."""
        _, tokens, heads, size = output.shape
        given = output.reshape(self.size, tokens // self.size, heads, size)
        found = _exchanged(given, self.group)  # the first dimension: whose heads they are
        return found.transpose(0, 1).reshape(1, tokens // self.size, self.size * heads, size)

    def of_all(self, own_n: Tensor, index_n: Tensor, total: int) -> Tensor:
        """The values of all ranks, put together: [total], with their gradients.

        Args:
            own_n: this rank's, numbers or truth values. index_n: their places among all.
        """
        numbers = own_n.float() if own_n.dtype == torch.bool else own_n
        result: Tensor = _Together.apply(numbers, index_n, total, self.group)
        return result.to(own_n.dtype)


def why_undivided(config: Any, attention: str, size: int) -> str | None:
    """Why a model's rows cannot be divided over `size` ranks, and what to do; None if they can.

    Args:
        config: of the model. attention: its implementation.
    """
    if attention != PACKED:
        remedy = f"take model.attention: {PACKED} where the model has it, or give 1"
        return f"attention {attention} computes each rank's tokens alone; {remedy}"
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % size or key_heads % size:
        numbers = [str(number) for number in range(2, key_heads + 1) if heads % number == key_heads % number == 0]
        which = f"a number that divides them ({', '.join(numbers)}), or 1" if numbers else "1"
        return f"{heads} heads with {key_heads} of keys cannot be divided over {size} ranks; give {which}"
    return None


def why_not_in_groups(ranks: int, size: int) -> str | None:
    """Why a run's ranks cannot be groups of `size`, with the recipe's key; None if they can."""
    if ranks % size == 0:
        return None
    return f"launch.sequence_parallel: {size} given, which does not divide the {ranks} ranks of the run"


def _exchanged(given: Tensor, group: Any) -> Tensor:
    result: Tensor = _Exchange.apply(given, group)
    return result


class _Exchange(Function):
    """Row i of the first dimension goes to rank i; what comes from rank i is row i of the result."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(given, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(given: Tensor, group: Any) -> Tensor:
    given = given.contiguous()
    found = torch.empty_like(given)
    torch.distributed.all_to_all_single(found, given, group=group)
    return found


class _Together(Function):
    """A sum over ranks, each of which fills other places: exact, because all other terms are zeros."""

    @staticmethod
    def forward(ctx: Any, own_n: Tensor, index_n: Tensor, total: int, group: Any) -> Tensor:
        ctx.save_for_backward(index_n)
        all_N = torch.zeros(total, dtype=own_n.dtype, device=own_n.device).index_copy_(0, index_n, own_n.detach())
        torch.distributed.all_reduce(all_N, group=group)
        return all_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        (index_n,) = ctx.saved_tensors
        return gradient_N[index_n], None, None, None
