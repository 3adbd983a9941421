"""The module that the engine shards: one forward computes the outputs of all streams for a micro-batch.

T packed tokens, N supervised tokens, R responses, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.reference import HowForwarded
from uft_ds.streams.adapters import as_stream, reference_of
from uft_ds.streams.divided import SequenceGroup, why_undivided
from uft_ds.streams.grouped import enable_lean_experts, experts_of_transformers
from uft_ds.streams.heads import (
    ScalarHead,
    head_outputs,
    is_trainable,
    logits_in_float32,
    make_logp_head,
    scalar_values,
)
from uft_ds.streams.lanes import Lanes, enable_lockstep
from uft_ds.streams.linear import enable_lean_linear
from uft_ds.streams.offload import activations_on_host
from uft_ds.streams.packed_attention import PACKED, attention_of_transformers, bounds_for_attention
from uft_ds.streams.policy import Policy, base_of, trains_all
from uft_ds.streams.stream import BARE_BASE, POLICY, WHOLE_POLICY, Output, Stream, trained_first


class UFTModel(nn.Module):
    """Streams over one set of frozen base weights: the policy, the reference, and further streams of a run.

    Where all parameters are trained, the reference may have weights of its own, a frozen copy of the base. All streams
    are computed inside one call of the root module: with two calls, ZeRO-3 would discard its prefetch trace in every
    step.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        reference: PreTrainedModel | None = None,
        further: Seq[Stream] = (),
        reference_mode: HowForwarded = "lockstep",
        activation_offload: bool = False,
        chunk_bytes: int | None = None,
        seed: int = 0,
        frozen_heads: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            policy: the base with its adapters, or without, if all parameters are trained.
            reference: where all are trained, the base once more, frozen, for steps that forward the reference. None:
                its log-probs are computed while the policy still is the base.
            further: streams besides policy and reference, such as `REWARD`; their adapters must exist already.
            reference_mode: lockstep: one pass over the weights for all streams. separate: a forward for each stream.
            activation_offload: keep saved activations in host memory.
            chunk_bytes: memory for the logits that are held at once; None: a default for the device.
            seed: of the initial weights of scalar heads.
            frozen_heads: by the name of a stream without gradient, its scalar head: [1, hidden]. Drawn if not given.
        Raises:
            ValueError: a stream's adapter is missing, or it is trained and the stream frozen, or the reverse; or the
                reference's own weights are trained, or the policy's base is frozen beside them.
            UserError: the model's layers or head are not known to work with the mode.
        """
        super().__init__()
        self.policy = policy
        self.reference = _frozen_copy(reference, policy)
        trained_stream = WHOLE_POLICY if trains_all(policy) else POLICY
        self.streams = {stream.name: stream for stream in (trained_stream, reference_of(policy), *further)}
        assert len(self.streams) == 2 + len(further), "streams have distinct names"
        self._in_lockstep = reference_mode == "lockstep"
        self._has_left_base = False
        self._among: SequenceGroup | None = None
        for stream in self.streams.values():
            self._check_adapter(stream)
        base = base_of(policy)
        make_logp_head(base, chunk_bytes=chunk_bytes)
        scalar = [stream for stream in further if stream.head == "scalar"]
        trained = {stream.name: self._scalar_head(seed) for stream in scalar if stream.trained}
        if trained:
            self.scores = nn.ModuleDict(trained)
        # Plain tensors. A module would be one more in forwards that have this stream, and ZeRO-3 gives up its prefetch
        # trace when other modules are called than before. A parameter would be sharded, and a buffer rounded to the
        # base's type by ZeRO-2.
        self._frozen_heads = dict(frozen_heads)
        for stream in scalar:
            if not stream.trained and stream.name not in frozen_heads:
                self._frozen_heads[stream.name] = self._scalar_head(seed).weight.detach()
        enable_lean_linear(base.get_decoder())
        enable_lean_experts(base.get_decoder())
        if reference is not None:
            make_logp_head(reference, chunk_bytes=chunk_bytes)
            enable_lean_linear(reference.get_decoder())
            enable_lean_experts(reference.get_decoder())
        if self._in_lockstep:
            enable_lockstep(base)
        self._activation_offload = activation_offload
        self.attention = str(base.get_decoder().config._attn_implementation)
        # DeepSpeed reduces a leaf layer's gradients in a backward hook of its inputs. If no input required grad, the
        # first layer's gradients would be reduced before they exist.
        base.enable_input_require_grads()

    def divide_rows(self, among: SequenceGroup) -> None:
        """From now on each rank of a group computes a part of every row; all of them are given the whole micro-batch.

        Raises:
            ValueError: the model's attention cannot, or its heads cannot be divided.
        """
        problem = why_undivided(base_of(self.policy).config, self.attention, among.size)
        if problem is not None:
            raise ValueError(problem)
        self._among = among

    def leave_base(self) -> None:
        """From now on the weights are trained: where all are, a stream without gradient needs weights of its own."""
        self._has_left_base = trains_all(self.policy)

    def _weights_of(self, stream: Stream) -> Any:
        """The model that computes a stream: the policy, with its adapters, or the reference's frozen copy."""
        return self.reference if stream == BARE_BASE and self.reference is not None else self.policy

    def _check_adapter(self, stream: Stream) -> None:
        if stream.adapter is None and stream.trained != (stream == WHOLE_POLICY and trains_all(self.policy)):
            raise ValueError(f"stream {stream.name!r}: the bare base is frozen and cannot be trained")
        if stream.adapter is None:
            return
        if trains_all(self.policy):
            raise ValueError(f"stream {stream.name!r}: there are no adapters where all parameters are trained")
        if stream.adapter not in self.policy.peft_config:
            raise ValueError(f"stream {stream.name!r}: there is no adapter {stream.adapter!r}")
        of_adapter = [p for name, p in self.policy.named_parameters() if f".{stream.adapter}." in name]
        if {parameter.requires_grad for parameter in of_adapter} != {stream.trained}:
            state = "trained" if stream.trained else "frozen"
            raise ValueError(f"stream {stream.name!r} is {state}, which its adapter {stream.adapter!r} is not")
        if stream.trained and stream.adapter != POLICY.adapter and not self._in_lockstep:
            # With separate forwards, the recomputation of this stream's layers in the backward would use the adapter
            # that is active then, the policy's.
            raise ValueError(f"stream {stream.name!r}: beside the policy, a stream is trained in lockstep only")

    def _scalar_head(self, seed: int) -> ScalarHead:
        """A head in the type of the adapters: DeepSpeed keeps one type for all that is trained."""
        base = base_of(self.policy)
        dtype = next(p.dtype for name, p in self.policy.named_parameters() if f".{POLICY.adapter}." in name)
        return ScalarHead(base.config.get_text_config().hidden_size, dtype=dtype, seed=seed)

    def forward(
        self,
        micro_batch: MicroBatch,
        streams: Seq[Stream],
        *,
        with_statistics: bool = False,
        through_logits: bool = False,
    ) -> dict[str, Output]:
        """The output of each stream for a micro-batch, by the stream's name.

        Args:
            streams: those of `self.streams` that are forwarded.
            with_statistics: whether outputs of a tokens head hold the entropy and the most probable tokens.
            through_logits: forward one stream by the definition, `_token_logps_through_logits`; for the check before
                the first step.
        Raises:
            ValueError: a stream is not of this model, or two streams cannot be forwarded together.
            RuntimeError: a stream without gradient is asked for, and its weights, or the head that all streams share,
                are trained.
        """
        ordered = trained_first(streams)
        for stream in ordered:
            if self.streams.get(stream.name) != stream:
                raise ValueError(f"{stream} is not of this model, which has {list(self.streams.values())}")
            if self._has_left_base and not stream.trained and self._weights_of(stream) is self.policy:
                raise RuntimeError(
                    f"stream {stream.name!r}: its weights are trained, the values must come from a cache"
                )
        if through_logits:
            (stream,) = ordered
            return {stream.name: Output(self._token_logps_through_logits(micro_batch, stream))}
        outputs: dict[Stream, Output] = {}
        of_policy = tuple(stream for stream in ordered if self._weights_of(stream) is self.policy)
        # The copy's whole forward first, its logits too: nothing is kept for the policy's backward yet.
        for own in (tuple(stream for stream in ordered if stream not in of_policy), of_policy):
            if own:
                with nullcontext() if own is of_policy else torch.no_grad():
                    outputs |= self._outputs(micro_batch, own, with_statistics=with_statistics)
        return {stream.name: outputs[stream] for stream in streams}

    def _outputs(
        self, micro_batch: MicroBatch, streams: tuple[Stream, ...], *, with_statistics: bool
    ) -> dict[Stream, Output]:
        """The outputs of streams that share their weights."""
        hidden_states = dict(zip(streams, self._hidden_states(micro_batch, streams), strict=True))
        outputs = self._token_outputs(hidden_states, micro_batch, with_statistics=with_statistics)
        return outputs | self._values(hidden_states, micro_batch)

    def _token_outputs(
        self, hidden_states: dict[Stream, Tensor], micro_batch: MicroBatch, *, with_statistics: bool
    ) -> dict[Stream, Output]:
        streams = [stream for stream in hidden_states if stream.head == "tokens"]
        if not streams:
            return {}
        head = base_of(self._weights_of(streams[0])).get_output_embeddings()
        among, total = self._among, len(micro_batch.token_ids_T)
        if is_trainable(head) and not trains_all(self.policy) and not all(stream.trained for stream in streams):
            raise RuntimeError("All streams share one head: if the head is trained, no stream can be without gradient.")
        predictors, targets, index_n = micro_batch.predictors_N, micro_batch.targets_N, None
        if among is not None:
            index_n, predictors = among.own_places(micro_batch.host_predictors_N, total, predictors.device)
            targets = targets[index_n]
        hidden = [hidden_states[stream][0].index_select(0, predictors) for stream in streams]
        trained = sum(stream.trained for stream in streams)
        outputs = head_outputs(head, hidden, targets, trained=trained, with_statistics=with_statistics)
        if among is not None and index_n is not None:
            outputs = [_of_all_ranks(output, among, index_n, len(micro_batch.targets_N)) for output in outputs]
        return dict(zip(streams, outputs, strict=True))

    def _values(self, hidden_states: dict[Stream, Tensor], micro_batch: MicroBatch) -> dict[Stream, Output]:
        streams, among = [stream for stream in hidden_states if stream.head == "scalar"], self._among
        if not streams:
            return {}
        outputs, places, index_r = {}, micro_batch.last_R, None
        if among is not None:
            index_r, places = among.own_places(micro_batch.host_last_R, len(micro_batch.token_ids_T), places.device)
        for stream in streams:
            values = self._values_of(stream, hidden_states[stream][0].index_select(0, places))
            if among is not None and index_r is not None:
                values = among.of_all(values, index_r, micro_batch.num_responses)
            outputs[stream] = Output(values_R=values)
        return outputs

    def _values_of(self, stream: Stream, hidden_RD: Tensor) -> Tensor:
        if stream.trained:
            values_R: Tensor = self.scores[stream.name](hidden_RD)
            return values_R
        return scalar_values(hidden_RD, self._frozen_heads[stream.name].to(hidden_RD.device))

    def _hidden_states(self, micro_batch: MicroBatch, streams: tuple[Stream, ...]) -> tuple[Tensor, ...]:
        """Final hidden states, [1, tokens, hidden] each, in the order of the streams: trained ones first."""
        base = base_of(self._weights_of(streams[0]))
        keeping = activations_on_host() if self._activation_offload and torch.is_grad_enabled() else nullcontext()
        with keeping:
            if self._in_lockstep:
                in_lockstep: tuple[Tensor, ...] = self._decode(base, micro_batch, lanes=Lanes(streams))
                return in_lockstep
            found: dict[Stream, Tensor] = {}
            for stream in reversed(streams):  # untrained streams first, before activations are kept for the backward
                with nullcontext() if stream.trained else torch.no_grad(), as_stream(base, stream):
                    found[stream] = self._decode(base, micro_batch)
            return tuple(found[stream] for stream in streams)

    def _decode(self, base: Any, micro_batch: MicroBatch, **lanes: Lanes) -> Any:
        """Final hidden states, [1, tokens, hidden]; with lanes, a tuple of those of all streams."""
        # use_cache=False is required: with a cache, transformers does not build the mask that separates packed
        # sequences.
        tokens_T, positions_T = micro_batch.token_ids_T, micro_batch.position_ids_T
        if self._among is not None:
            tokens_T, positions_T = self._among.own(tokens_T), self._among.own(positions_T)
        return base.get_decoder()(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            **self._sequence_bounds(micro_batch),
            **lanes,
        ).last_hidden_state

    def _token_logps_through_logits(self, micro_batch: MicroBatch, stream: Stream) -> Tensor:
        """Token log-probs by the definition: [supervised tokens], float32, nats.

        They come from Hugging Face's own forward of each sequence alone, given only its tokens, and log_softmax. The
        logits are not rounded to the model's dtype, so that a difference in bfloat16 is not just rounding.

        Raises:
            ValueError: sequences share a prompt, so no segment is a sequence.
        """
        if micro_batch.shares_prompts:
            raise ValueError(
                "the model's own forward takes whole sequences: make the micro-batch without shared prompts"
            )
        model = self._weights_of(stream)
        base = base_of(model)
        bounds = [0, *accumulate(micro_batch.lengths)]
        with (
            as_stream(model, stream),
            logits_in_float32(base.get_output_embeddings()),
            attention_of_transformers(base),
            experts_of_transformers(base),
        ):
            logits_TV = torch.cat(
                [
                    model(
                        input_ids=micro_batch.token_ids_T[None, start:end],
                        use_cache=False,
                        **self._bounds_of_one(micro_batch.bounds_S, end - start),
                    ).logits[0]
                    for start, end in pairwise(bounds)
                ]
            )
        logps_NV = logits_TV.index_select(0, micro_batch.predictors_N).float().log_softmax(dim=-1)
        return logps_NV.gather(1, micro_batch.targets_N[:, None]).squeeze(1)

    def _bounds_of_one(self, like: Tensor, length: int) -> dict[str, Any]:
        """For the model's own forward of one sequence, which has packed attention switched off."""
        return {} if self.attention == PACKED else self._bounds(like.new_tensor([0, length]), (length,))

    def _sequence_bounds(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Where the segments of a row begin and end, for an attention that reads it.

        Raises:
            ValueError: sequences share a prompt, which this attention cannot.
        """
        if micro_batch.shares_prompts and not self.can_share_prompts:
            raise ValueError(f"attention {self.attention} cannot share a prompt between sequences, which packed does")
        bounds_S, lengths, prompt_of = micro_batch.bounds_S, micro_batch.lengths, micro_batch.prompt_of
        added = 0 if self._among is None else self._among.padded(sum(lengths)) - sum(lengths)
        if added:  # tokens that nothing reads, as a sequence of their own
            bounds_S = torch.cat([bounds_S, bounds_S[-1:] + added])
            lengths, prompt_of = (*lengths, added), (*prompt_of, None)
        return self._bounds(bounds_S, lengths, prompt_of, self._among)

    def _bounds(
        self,
        bounds: Tensor,
        lengths: tuple[int, ...],
        prompt_of: tuple[int | None, ...] | None = None,
        among: SequenceGroup | None = None,
    ) -> dict[str, Any]:
        if self.attention == PACKED:
            return bounds_for_attention(bounds, lengths, prompt_of, among)
        if "flash" not in self.attention:
            return {}
        # Without them, transformers would compute them in every layer.
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    @property
    def can_share_prompts(self) -> bool:
        """Whether a micro-batch may hold a prompt once for several sequences: see `data.micro_batch.micro_batch`."""
        return self.attention == PACKED


def _frozen_copy(reference: PreTrainedModel | None, policy: Policy) -> PreTrainedModel | None:
    """
    Raises:
        ValueError: there is a copy, and the policy's base is frozen, which would do as well, or the copy is not.
    """
    if reference is None:
        return None
    if not trains_all(policy):
        raise ValueError("the reference of adapters is their own base; it needs no copy")
    trained = next((name for name, p in reference.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise ValueError(f"the reference's copy of the base is frozen, but {trained} is trained")
    return reference


def _of_all_ranks(output: Output, among: SequenceGroup, index_n: Tensor, total: int) -> Output:
    """What the ranks of a group found for their own tokens, put together: [supervised tokens] of the whole row each."""
    found = (output.token_logps_N, output.entropy_N, output.is_top1_N)
    logps_N, entropy_N, is_top1_N = (None if of_n is None else among.of_all(of_n, index_n, total) for of_n in found)
    return Output(logps_N, entropy_N, is_top1_N)
