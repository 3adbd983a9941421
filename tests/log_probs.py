"""Log-probs of responses by Hugging Face's own forward, the whole model in memory: what tests compare with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.implicit_reward import response_logps


@torch.no_grad()
def hugging_face_logps(model: Any, sequences: tuple[Sequence, ...], *, adapters: bool = True) -> Tensor:
    """log pi(y|x) by log_softmax in float32, each sequence alone: [responses], nats, float64."""
    sums = []
    for sequence in sequences:
        batch = micro_batch([sequence]).to(model.device)
        with nullcontext() if adapters else model.disable_adapter():
            logits_TV = model(input_ids=batch.token_ids_T[None], use_cache=False).logits[0].float()
        logps_NV = logits_TV.index_select(0, batch.predictors_N).log_softmax(dim=-1)
        token_logps_N = logps_NV.gather(1, batch.targets_N[:, None]).squeeze(1)
        sums.append(response_logps(token_logps_N, batch.response_of_N, len(batch.responses)).cpu())
    return torch.cat(sums)
