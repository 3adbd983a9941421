"""What becomes of a task of lm-evaluation-harness before it is asked: its rows, examples and limit of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uft_ds.errors import UserError

_NEW_TOKENS = 256
"""Limit of an answer where a task says none; the harness's own, in memory and on a server."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What the harness takes as the limit of an answer."""


@contextmanager
def rows_mapped_anew() -> Iterator[None]:
    """Within the block what tasks make of their rows is not taken from the disk.

    GPQA's options are shuffled by Python's own generator. datasets would keep the order of another seed, as it knows
    a result by the function and not by the generator's state.
    """
    import datasets

    was_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_caching()


def pin_rows(task: Any, seeds: tuple[int, int, int, int]) -> None:
    """Make a task's questions and examples once, each from the seeds, whatever else is asked.

    The harness makes them anew whenever it looks at them. What is shuffled would then be asked in one order and graded
    in another.
    """
    seed(seeds)
    docs = task.eval_docs
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: docs)
    if hasattr(task, "sampler"):
        seed(seeds)
        task.sampler.replace_df(list(task.fewshot_docs()))


def check_examples(name: str, task: Any, shots: int) -> None:
    """Refuse more examples in a prompt than there are rows for them, before anything is asked.

    Raises:
        UserError: names both numbers.
    """
    if not shots or not hasattr(task, "sampler"):
        return
    own = task.eval_docs[0] if task.fewshot_cfg.split == task.config.test_split else None  # no example of itself
    try:
        task.sampler.sample(shots, eval_doc=own)
    except (ValueError, AssertionError):  # as it would in the middle of the evaluation
        rows = len(task.sampler.df) - (own is not None)
        raise UserError(
            f"--suite: {name}: {shots} examples in each prompt, but there are rows for {max(0, rows)}; ask for fewer "
            f"with {name}={max(0, rows)}, or bring more rows"
        ) from None


def seed(seeds: tuple[int, int, int, int]) -> None:
    import numpy as np
    import torch

    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])


def shorten(task: Any, most: int) -> None:
    """Let a task ask for no more than `most` new tokens in an answer, by whichever name it says its own limit."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.OUTPUT_TYPE == "generate_until":
        kwargs = dict(task.get_config("generation_kwargs") or {})
        own = int(normalize_gen_kwargs(dict(kwargs), _NEW_TOKENS)["max_gen_toks"])
        kept = {key: value for key, value in kwargs.items() if key not in _LIMITS}
        task.set_config(key="generation_kwargs", value=kept | {"max_gen_toks": min(own, most)})
