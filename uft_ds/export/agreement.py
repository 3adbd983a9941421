"""Measure how much of the training a merged model keeps, by its log-ratios to the base.

Rounding a small delta into bfloat16 weights can lose most of it. Log-probs hide this loss, log-ratios show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from uft_ds.data.example import Response, Sequence
from uft_ds.data.store.store_files import check_content
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.export.streamed_logps import empty_model, num_units, streamed_logps, with_adapter
from uft_ds.streams.base_weights import base_weights
from uft_ds.streams.load import check_base
from uft_ds.streams.nf4 import Nf4Base
from uft_ds.streams.weight_files import WeightFiles

MAX_RELATIVE_ERROR = 0.1
"""Root mean square error of the merged model's log-ratios, relative to their own root mean square."""

ROUNDING_NATS = 1e-4
"""An RMS error below this is the float32 rounding error of log-probs, independent of the training."""

LOG_RATIOS = "log-ratios"
CHANGES_OF_REWARDS = "changes of rewards"

SEQUENCES_CHECKED = 16
TOKENS_CHECKED = 2048


@dataclass(frozen=True)
class Agreement:
    """Comparison of the merged model's log-ratios with those of base + adapter.

    share_kept: slope of the regression of the merged model's log-ratios on the adapter's; 1 is perfect.
    relative_error: RMS error of the log-ratios divided by the adapter's RMS. error_nats: that RMS error.
    largest_nats: largest absolute log-ratio of the adapter.
    of: what is compared. Of a reward model it is how much the adapters change a reward, which has no unit.
    """

    num_responses: int
    share_kept: float
    relative_error: float
    error_nats: float
    largest_nats: float
    of: str = LOG_RATIOS

    @property
    def unit(self) -> str:
        return " nats" if self.of == LOG_RATIOS else ""

    @property
    def summary(self) -> str:
        found = (
            f"{self.share_kept:.2%} of the adapter's {self.of} kept on {self.num_responses} responses, relative error "
            f"{self.relative_error:.2%}"
        )
        if self.is_rounding:
            found += (
                f" (of {self.error_nats:.1e}{self.unit}: the training changed too little to distinguish from rounding)"
            )
        return found

    @property
    def is_rounding(self) -> bool:
        """Whether the relative error exceeds the bound only because the log-ratios are of the size of rounding."""
        return self.relative_error > MAX_RELATIVE_ERROR and self.error_nats < ROUNDING_NATS

    @property
    def is_faithful(self) -> bool:
        return self.relative_error <= MAX_RELATIVE_ERROR or self.is_rounding


def compare(
    base: Path,
    adapter: Path,
    merged: Path,
    sequences: tuple[Sequence, ...],
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    *,
    nf4: Nf4Base | None = None,
) -> Agreement:
    """Compare base + adapter (by PEFT) with the merged model: log-ratios to the base, in float32, layer by layer.

    Args:
        nf4: the base in NF4 that was trained on; None: in 16 bits.
        on_unit: called with the number of layers and other parts that have been forwarded, and their total.
    """
    of_merged = empty_model(check_base(str(merged), None))
    done = 2 * num_units(of_merged)
    total = 3 * num_units(of_merged)

    def count() -> None:
        nonlocal done
        done += 1
        on_unit(done, total)

    base_R, adapter_R = base_and_log_ratios(
        base, adapter, sequences, lambda visited, _: on_unit(visited, total), nf4=nf4
    )
    merged_R = streamed_logps(of_merged, WeightFiles(merged), sequences, on_unit=count) - base_R
    return agreement(adapter_R, merged_R)


def base_and_log_ratios(
    base: Path,
    adapter: Path,
    sequences: tuple[Sequence, ...],
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    *,
    nf4: Nf4Base | None = None,
) -> tuple[Tensor, Tensor]:
    """The base's log-probs, and the log-ratios of base + adapter to them: [responses] each, nats, in float32.

    PEFT loads the adapter and Hugging Face's forward computes both, layer by layer; no part of training is used. A base
    in NF4 is computed by its rounded weights.

    Args:
        nf4: as for `compare`.
        on_unit: called with the number of layers and other parts that have been forwarded, and their total.
    """
    weights = base_weights(base, nf4)
    policy = with_adapter(empty_model(check_base(str(base), None)), adapter)
    total, done = 2 * num_units(policy), 0

    def count() -> None:
        nonlocal done
        done += 1
        on_unit(done, total)

    base_R = streamed_logps(policy, weights, sequences, adapters=False, on_unit=count)
    return base_R, streamed_logps(policy, weights, sequences, on_unit=count) - base_R


def agreement(adapter_R: Tensor, merged_R: Tensor, of: str = LOG_RATIOS) -> Agreement:
    """Agreement of two vectors of log-ratios, [responses] each, nats; perfect if both are zero.

    Args:
        of: what is compared instead.
    """
    power = adapter_R.square().sum()
    error_R = merged_R - adapter_R
    if power == 0:
        share, error = (1.0, 0.0) if not merged_R.any() else (0.0, float("inf"))
    else:
        share = float((adapter_R * merged_R).sum() / power)
        error = float(error_R.square().sum().div(power).sqrt())
    error_nats = float(error_R.square().mean().sqrt())
    return Agreement(len(adapter_R), share, error, error_nats, float(adapter_R.abs().max()), of)


def sequences_of_run(sample: Path) -> tuple[Sequence, ...]:
    """A few tokenised sequences of a run's data sample; held-out ones come first, if the run has any."""
    check_content(sample)
    store = TokenStore(sample, "data")
    sequences = (sequence for index in range(len(store)) for sequence in store.unit(index, pair_id=index))
    chosen: list[Sequence] = []
    tokens = 0
    for sequence in islice(sequences, SEQUENCES_CHECKED):
        tokens += sequence.num_tokens
        if chosen and tokens > TOKENS_CHECKED:
            break
        chosen.append(sequence)
    return tuple(chosen)


def sample_sequences(chat: ChatTokenizer) -> tuple[Sequence, ...]:
    """Built-in prose, a calculation and code, for an adapter without known data; the first token is context only."""
    text = (resources.files("uft_ds") / "export" / "sample.txt").read_text(encoding="utf-8")
    sequences = []
    for line in text.splitlines():
        ids = np.array(chat.tokenizer.encode(line.replace("\\n", "\n"), verbose=False), dtype=np.int32)
        sequences.append(Sequence(ids, (Response(1, len(ids), 1.0, "instruction", "sample"),)))
    return tuple(sequences)
