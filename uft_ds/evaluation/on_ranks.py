"""Answers of the policy that all ranks of a run generate together, each a share of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed
from uft_ds.evaluation.cache import cache_is_exact
from uft_ds.evaluation.decoding import Decoding, Row, Together, continue_at_once, continue_in_pieces, draw_of
from uft_ds.evaluation.generate import configured, generation_config
from uft_ds.streams.adapters import as_stream
from uft_ds.streams.packed_attention import attention_of_transformers
from uft_ds.streams.policy import base_of
from uft_ds.streams.stream import POLICY


@contextmanager
def policy_generates(engine: Engine, how: Decoding, *, whole: bool = False) -> Iterator[Any]:
    """Within the block, the Hugging Face model of the policy, ready to generate. Every rank must enter it.

    Args:
        whole: whether each rank holds all weights meanwhile, which ZeRO-3 otherwise gathers again for each token.
    """
    model = base_of(engine.module.policy)
    config = generation_config(list(how.stop_ids), how.pad_id, max_new_tokens=how.max_new_tokens, temperature=0.0)
    with (
        engine.evaluating(),
        engine.whole() if whole else nullcontext(),
        as_stream(model, POLICY),
        configured(model, config),
        attention_of_transformers(model),
    ):
        yield model


def may_continue_caches(engine: Engine, prompt: Seq[int]) -> bool:
    """Whether prompts may be read once for several answers, and ended rows leave a batch: measured, on all ranks.

    Must be called inside `policy_generates`, by every rank, with the same prompt.
    """
    return engine.agree(not cache_is_exact(base_of(engine.module.policy), list(prompt), engine.device)) == 0


def answers_on_ranks(
    engine: Engine,
    rows: Seq[Row],
    how: Decoding,
    *,
    tokens_per_batch: int,
    continues_caches: bool,
    stop: Callable[[], None],
    on_done: Callable[[int], None],
) -> list[list[int]]:
    """The ids that the policy appends to each row, up to the first stop token, which is kept; the same on every rank.

    Must be called inside `policy_generates`, by every rank, with the same arguments. Where layers are gathered in each
    forward, all ranks take as many tokens as the longest answer of any of them. Ranks that share the rows of training
    answer other rows, too: each holds whole ones here.

    Args:
        tokens_per_batch: most tokens, prompts and answers, that a rank holds at once; a single row may hold more.
        continues_caches: as measured by `may_continue_caches`; without, each row is read by itself and stays to the
            end of its batch.
        stop: called before each batch; raises on all ranks or on none.
        on_done: called with the number of rows that have been answered.
    Raises:
        CheckFailed: on every rank; logits are not finite.
    """
    model, device, ranks = base_of(engine.module.policy), engine.device, engine.world_size
    together = Together(engine.gathers_layers and ranks > 1, lambda holds: engine.agree(int(holds)) > 0)
    own: dict[int, list[int]] = {}
    is_finite, done = True, 0
    for batch in batches_of(rows, ranks, how.max_new_tokens, tokens_per_batch):
        stop()
        shares = shares_of(batch, ranks)
        share = shares[engine.rank]
        # A rank without a row answers one that another rank answers, because all must forward as often.
        asked = [rows[place] for place in share or batch[:1]]
        draw = draw_of(asked, how, device)
        if continues_caches:
            prompts_first = _repeats(rows, shares) and min(len(rows[place].token_ids) for place in batch) > 1
            found = continue_in_pieces(
                model, asked, how, draw, device=device, together=together, prompts_first=prompts_first
            )
        else:
            found = continue_at_once(model, asked, how, draw, device=device, together=together)
        is_finite &= draw.is_finite
        own |= dict(zip(share, found, strict=False))
        done += len(batch)
        on_done(done)
    gathered = engine.gather_objects((own, is_finite))
    if not all(finite for _, finite in gathered):
        problem = "the policy's logits are not finite while it answers, so its tokens mean nothing"
        raise CheckFailed(problem, by_all=True)
    answered = {place: ids for of_rank, _ in gathered for place, ids in of_rank.items()}
    return [answered[place] for place in range(len(rows))]


def batches_of(rows: Seq[Row], ranks: int, new_tokens: int, tokens_per_batch: int) -> list[list[int]]:
    """Places of the rows that all ranks answer at once, the longest first: this needs little padding.

    Args:
        new_tokens: most tokens of an answer.
        tokens_per_batch: as in `answers_on_ranks`.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].token_ids), reverse=True)
    batches = []
    while order:
        of_rank = max(1, tokens_per_batch // (len(rows[order[0]].token_ids) + new_tokens))
        batches.append(order[: of_rank * ranks])
        order = order[of_rank * ranks :]
    return batches


def shares_of(batch: Seq[int], ranks: int) -> list[list[int]]:
    """The places of each rank: neighbours, so that answers to one prompt are together."""
    bounds = [len(batch) * rank // ranks for rank in range(ranks + 1)]
    return [list(batch[start:end]) for start, end in pairwise(bounds)]


def _repeats(rows: Seq[Row], shares: Seq[Seq[int]]) -> bool:
    """Whether any rank has a prompt twice."""
    return any(len({rows[place].token_ids for place in share}) < len(share) for share in shares)
