"""Answers of one model to a batch of rows: each prompt is read once, and rows that have ended leave the batch.

B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uft_ds.evaluation.cache import new_cache
from uft_ds.evaluation.drawing import Draw
from uft_ds.evaluation.generate import appended, left_pad

PIECE = 16
"""Tokens after which rows that have ended leave the batch. Each piece is one call of `generate`, a few milliseconds."""


@dataclass(frozen=True)
class Decoding:
    """How rows are continued.

    temperature: logits are divided by it; 0: the likeliest token, as below `generate.LEAST_TEMPERATURE`.
    top_p: the share of probability from which a token is drawn; 1: all.
    pad_id: a token of the vocabulary that stands where nothing is.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Row:
    """A prompt that is continued once. seed: of what is drawn."""

    token_ids: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Together:
    """How the ranks that generate at the same time stay together.

    is_synced: whether every rank must forward as often as the others, because layers are gathered in each forward.
    any_rank: whether something holds on any rank; a collective.
    """

    is_synced: bool
    any_rank: Callable[[bool], bool]


ALONE = Together(False, lambda holds: holds)


def draw_of(rows: Seq[Row], how: Decoding, device: torch.device) -> Draw:
    return Draw([row.seed for row in rows], temperature=how.temperature, top_p=how.top_p, device=device)


def continue_at_once(
    model: Any, rows: Seq[Row], how: Decoding, draw: Draw, *, device: torch.device, together: Together = ALONE
) -> list[list[int]]:
    """The ids that are appended to each row, by one call of Hugging Face's `generate`, for models of any kind.

    Must be called inside `configured`, with a greedy config.

    Returns:
        for each row, the ids up to its first stop token, which is kept.
    """
    ids_BT, mask_BT = (tensor.to(device) for tensor in left_pad([list(row.token_ids) for row in rows], how.pad_id))
    new_BT = appended(model, ids_BT, mask_BT, logits_processor=[draw], synced_gpus=together.is_synced)
    return [through_stop(ids, how.stop_ids) for ids in new_BT.tolist()]


def continue_in_pieces(
    model: Any,
    rows: Seq[Row],
    how: Decoding,
    draw: Draw,
    *,
    device: torch.device,
    together: Together = ALONE,
    prompts_first: bool,
) -> list[list[int]]:
    """As `continue_at_once`, for models of which `cache.cache_is_exact`.

    Args:
        prompts_first: whether each different prompt is read once, before the first token of an answer; then all have
            two tokens at least. The same on all ranks that generate together.
    """
    batch = _start(model, rows, how, device, is_synced=together.is_synced, prompts_first=prompts_first)
    answers: list[list[int]] = [[] for _ in rows]
    left = how.max_new_tokens
    while left > 0:
        count = min(PIECE, left)
        left -= count
        if batch.rows:
            new_BT = _piece(model, batch, draw, count, is_synced=together.is_synced)
            for row, ids in zip(batch.rows, new_BT.tolist(), strict=True):
                answers[row] += through_stop(ids, how.stop_ids)
            places = [place for place, row in enumerate(batch.rows) if answers[row][-1] not in how.stop_ids]
            batch.keep(places)
            draw.keep(places)
        else:
            _stay_with_others(model, how.pad_id, count, device)
        if not (together.any_rank(bool(batch.rows)) if together.is_synced else batch.rows):
            break
    return answers


@dataclass
class _Batch:
    """Rows that are being continued. The cache holds all tokens but the last one of each."""

    rows: list[int]
    ids_BT: Tensor
    mask_BT: Tensor
    cache: Any

    def keep(self, places: list[int]) -> None:
        """Go on with the rows at these places."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        index = torch.tensor(places, dtype=torch.long, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
        self.cache.batch_select_indices(index)


def _start(
    model: Any, rows: Seq[Row], how: Decoding, device: torch.device, *, is_synced: bool, prompts_first: bool
) -> _Batch:
    ids_BT, mask_BT = (tensor.to(device) for tensor in left_pad([list(row.token_ids) for row in rows], how.pad_id))
    cache = new_cache(model, room=ids_BT.shape[1] + how.max_new_tokens)
    if prompts_first:
        of_each = [row.token_ids for row in rows]
        prompts = list(dict.fromkeys(of_each))
        firsts = torch.tensor([of_each.index(prompt) for prompt in prompts], device=device)
        # `generate` continues a cache from at least one token that is not in it: the last one. The token that this call
        # appends is not used.
        appended(
            model,
            ids_BT[firsts, :-1],
            mask_BT[firsts, :-1],
            past_key_values=cache,
            max_new_tokens=1,
            synced_gpus=is_synced,
        )
        cache.batch_select_indices(torch.tensor([prompts.index(prompt) for prompt in of_each], device=device))
    return _Batch(list(range(len(rows))), ids_BT, mask_BT, cache)


def _piece(model: Any, batch: _Batch, draw: Draw, count: int, *, is_synced: bool) -> Tensor:
    """Append up to `count` tokens to each row; fewer if all rows have ended. [B, new tokens]"""
    new_BT = appended(
        model,
        batch.ids_BT,
        batch.mask_BT,
        past_key_values=batch.cache,
        max_new_tokens=count,
        logits_processor=[draw],
        synced_gpus=is_synced,
    )
    batch.ids_BT = torch.cat([batch.ids_BT, new_BT], dim=1)
    batch.mask_BT = torch.cat([batch.mask_BT, torch.ones_like(new_BT)], dim=1)
    return new_BT


def _stay_with_others(model: Any, token: int, count: int, device: torch.device) -> None:
    """Forward as often as the other ranks, whose rows have not ended."""
    ids_BT = torch.tensor([[token]], device=device)
    appended(model, ids_BT, torch.ones_like(ids_BT), max_new_tokens=count, synced_gpus=True)


def through_stop(ids: list[int], stop_ids: Seq[int]) -> list[int]:
    """The ids up to the first stop token, which is kept; all of them if there is none."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
