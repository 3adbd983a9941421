"""The module that the engine shards: one forward gives the log-probs of policy and reference.

T packed tokens, N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.implicit_reward import response_logps
from uft_ds.streams.adapters import as_reference
from uft_ds.streams.heads import head_logps, is_trainable, logits_in_float32, make_logp_head
from uft_ds.streams.lanes import ReferenceLane, enable_lockstep
from uft_ds.streams.offload import activations_on_host

Streams = Literal["both", "policy", "reference"]
"""Which of the two are forwarded."""

ReferenceMode = Literal["lockstep", "separate"]
"""One visit of the weights for both streams, or a second forward with the adapters off."""


class UFTModel(nn.Module):
    """Policy (adapters on) and reference (adapters off) over one set of frozen base weights.

    Both streams lie inside one call of the root module: with two calls, ZeRO-3 throws its prefetch trace away
    on every step.
    """

    def __init__(
        self,
        policy: PeftModel,
        *,
        reference_mode: ReferenceMode = "lockstep",
        activation_offload: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        base: Any = policy.get_base_model()
        make_logp_head(base, chunk_bytes=chunk_bytes)
        self._in_lockstep = reference_mode == "lockstep"
        if self._in_lockstep:
            enable_lockstep(base)
        self._activation_offload = activation_offload
        self.attention = str(base.config._attn_implementation)
        # Without an input that requires grad, the first leaf layer's gradients would be reduced before they exist.
        base.enable_input_require_grads()

    def forward(
        self, micro_batch: MicroBatch, *, streams: Streams = "both", through_logits: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Log-probs of the responses under the policy and under the reference.

        Args:
            streams: what is forwarded; the log-probs of the other are None.
            through_logits: by the definition, `token_logps_through_logits`, policy alone; for the check at the start.
        Returns:
            [responses] each, nats, summed over tokens in float64; the reference without gradient.
        """
        if through_logits:
            return _per_response(self.token_logps_through_logits(micro_batch), micro_batch), None
        logps_N, reference_logps_N = self.token_logps(micro_batch, streams=streams)
        return (
            None if logps_N is None else _per_response(logps_N, micro_batch),
            None if reference_logps_N is None else _per_response(reference_logps_N, micro_batch),
        )

    def token_logps(self, micro_batch: MicroBatch, *, streams: Streams = "both") -> tuple[Tensor | None, Tensor | None]:
        """Log-probs of the supervised tokens, policy and reference: [supervised tokens] each, float32, nats.

        Raises:
            RuntimeError: a reference asked of a model whose head is trained: it goes through the head as it is now.
        """
        base: Any = self.policy.get_base_model()
        head, targets_N = base.get_output_embeddings(), micro_batch.targets_N
        if streams != "policy" and is_trainable(head):
            raise RuntimeError("The reference shares the head with the policy: a head that is trained has none.")
        if streams == "reference":
            with torch.no_grad(), as_reference(base):
                logps_N, _ = head_logps(head, self._hidden(base, micro_batch), targets_N)
            return None, logps_N
        hidden_ND, reference_hidden_ND = self._hidden_of_streams(base, micro_batch, streams)
        return head_logps(head, hidden_ND, targets_N, reference_hidden_ND)

    def _hidden_of_streams(self, base: Any, micro_batch: MicroBatch, streams: Streams) -> tuple[Tensor, Tensor | None]:
        keeping = activations_on_host() if self._activation_offload and torch.is_grad_enabled() else nullcontext()
        with keeping:
            if streams == "policy":
                return self._hidden(base, micro_batch), None
            if self._in_lockstep:
                hidden_1TD, reference_1TD = self._decode(base, micro_batch, ReferenceLane())
                return _predictors(hidden_1TD, micro_batch), _predictors(reference_1TD, micro_batch)
            with torch.no_grad(), as_reference(base):
                reference_hidden_ND = self._hidden(base, micro_batch)
            return self._hidden(base, micro_batch), reference_hidden_ND

    def _hidden(self, base: Any, micro_batch: MicroBatch) -> Tensor:
        return _predictors(self._decode(base, micro_batch), micro_batch)

    def _decode(self, base: Any, micro_batch: MicroBatch, lane: ReferenceLane | None = None) -> Any:
        """Final hidden states, [1, tokens, hidden]; with a lane, those of policy and reference."""
        # use_cache=False is not a detail: with a cache the mask that keeps packed sequences apart is not built.
        return base.get_decoder()(
            input_ids=micro_batch.token_ids_T[None],
            position_ids=micro_batch.position_ids_T[None],
            use_cache=False,
            **self._sequence_bounds(micro_batch),
            **({} if lane is None else {"lane": lane}),
        ).last_hidden_state

    def token_logps_through_logits(self, micro_batch: MicroBatch) -> Tensor:
        """The policy's by the definition: [supervised tokens], float32, nats.

        Hugging Face's own forward of each sequence alone, given nothing but its tokens, and log_softmax. Only the
        logits are not rounded to the model's dtype, so that in bfloat16 too the difference is not rounding.
        """
        base: Any = self.policy.get_base_model()
        bounds_S = micro_batch.bounds_S.tolist()
        with logits_in_float32(base.get_output_embeddings()):
            logits_TV = torch.cat(
                [
                    self.policy(
                        input_ids=micro_batch.token_ids_T[None, start:end],
                        use_cache=False,
                        **self._bounds(micro_batch.bounds_S.new_tensor([0, end - start]), end - start),
                    ).logits[0]
                    for start, end in pairwise(bounds_S)
                ]
            )
        logps_NV = logits_TV.index_select(0, micro_batch.predictors_N).float().log_softmax(dim=-1)
        return logps_NV.gather(1, micro_batch.targets_N[:, None]).squeeze(1)

    def _sequence_bounds(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """What flash-attention needs to keep sequences apart; left to itself it finds out once a layer."""
        return self._bounds(micro_batch.bounds_S, micro_batch.longest)

    def _bounds(self, bounds: Tensor, longest: int) -> dict[str, Any]:
        if "flash" not in self.attention:
            return {}
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _predictors(hidden_1TD: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The positions that predict a supervised token: [supervised tokens, hidden]."""
    return hidden_1TD[0].index_select(0, micro_batch.predictors_N)


def _per_response(token_logps_N: Tensor, micro_batch: MicroBatch) -> Tensor:
    return response_logps(token_logps_N, micro_batch.response_of_N, micro_batch.num_responses)
