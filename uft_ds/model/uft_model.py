"""The module that the engine shards: one forward gives the log-probs of policy and reference.

T packed tokens, N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from uft_ds.data.packing import MicroBatch
from uft_ds.errors import UserError
from uft_ds.kernels.token_logps import attach, logps_and_gradients
from uft_ds.model.adapters import adapters_off
from uft_ds.objectives.implicit_reward import response_logps


class LogpHead(nn.Linear):
    """The model's own head, which also turns hidden states into log-probs.

    Under ZeRO-3 only the head's own forward may touch its weight: reading it anywhere else registers it with
    the reader and adds gathers.
    """

    def forward(  # type: ignore[override] # a superset of nn.Linear's
        self, hidden: Tensor, targets_N: Tensor | None = None, reference_hidden_ND: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """Logits; or, with targets, what `logps_and_gradients` returns."""
        if targets_N is None:
            return super().forward(hidden)
        return logps_and_gradients(
            hidden, self.weight, targets_N, reference_hidden_ND=reference_hidden_ND, bias_V=self.bias
        )


class UFTModel(nn.Module):
    """Policy (adapters on) and reference (adapters off) over one set of frozen base weights.

    Both forwards lie inside one call of the root module: with two calls, ZeRO-3 throws its prefetch trace away
    on every step.
    """

    def __init__(self, policy: PeftModel) -> None:
        super().__init__()
        self.policy = policy
        base: Any = policy.get_base_model()
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(f"model.base: {type(base).__name__} has a head of type {type(head).__name__}, not Linear")
        head.__class__ = LogpHead
        self._uses_flash_attention = "flash" in str(base.config._attn_implementation)
        # Without an input that requires grad, the first leaf layer's gradients would be reduced before they exist.
        base.enable_input_require_grads()

    def forward(
        self, micro_batch: MicroBatch, *, with_reference: bool = True, through_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the responses under the policy and under the reference.

        Args:
            with_reference: False runs the policy alone.
            through_logits: by the definition, Hugging Face's own forward and log_softmax, policy alone; for the check
                at the start, which finds models that scale or cap their logits.
        Returns:
            [responses] each, nats, summed over tokens in float64; the reference without gradient, or None.
        """
        if through_logits:
            logps_N, reference_logps_N = self.token_logps_through_logits(micro_batch), None
        else:
            logps_N, reference_logps_N = self.token_logps(micro_batch, with_reference=with_reference)
        policy_R = _per_response(logps_N, micro_batch)
        return policy_R, None if reference_logps_N is None else _per_response(reference_logps_N, micro_batch)

    def token_logps(self, micro_batch: MicroBatch, *, with_reference: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the supervised tokens: [supervised tokens] each, float32, nats."""
        base: Any = self.policy.get_base_model()
        reference_hidden_ND = None
        if with_reference:
            with torch.no_grad(), adapters_off(base):
                reference_hidden_ND = self._hidden(base, micro_batch)
        hidden_ND = self._hidden(base, micro_batch)
        head = base.get_output_embeddings()
        logps_N, gradients_ND, reference_logps_N = head(hidden_ND.detach(), micro_batch.targets_N, reference_hidden_ND)
        return attach(hidden_ND, logps_N, gradients_ND), reference_logps_N

    def _hidden(self, base: Any, micro_batch: MicroBatch) -> Tensor:
        """Final hidden states of the positions that predict a supervised token: [supervised tokens, hidden]."""
        # use_cache=False is not a detail: with a cache the mask that keeps packed sequences apart is not built.
        hidden_1TD = base.get_decoder()(
            input_ids=micro_batch.token_ids_T[None],
            position_ids=micro_batch.position_ids_T[None],
            use_cache=False,
            **self._sequence_bounds(micro_batch),
        ).last_hidden_state
        return hidden_1TD[0].index_select(0, micro_batch.predictors_N)

    def token_logps_through_logits(self, micro_batch: MicroBatch) -> Tensor:
        """The policy's by Hugging Face's own forward and log_softmax: [supervised tokens], float32, nats."""
        logits_1TV = self.policy(
            input_ids=micro_batch.token_ids_T[None],
            position_ids=micro_batch.position_ids_T[None],
            use_cache=False,
            **self._sequence_bounds(micro_batch),
        ).logits
        logps_NV = logits_1TV[0].index_select(0, micro_batch.predictors_N).float().log_softmax(dim=-1)
        return logps_NV.gather(1, micro_batch.targets_N[:, None]).squeeze(1)

    def _sequence_bounds(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """What flash-attention needs to keep sequences apart; left to itself it finds out once a layer."""
        if not self._uses_flash_attention:
            return {}
        bounds, longest = micro_batch.bounds_S, micro_batch.longest
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _per_response(token_logps_N: Tensor, micro_batch: MicroBatch) -> Tensor:
    return response_logps(token_logps_N, micro_batch.response_of_N, micro_batch.num_responses)
