"""Build a rank's engine, model and reference cache from the run's settings; `rank.py` calls it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from uft_ds.architectures.facts import attention_parity
from uft_ds.checkpoint.load import stored_reference
from uft_ds.data.example import KEY_BYTES
from uft_ds.data.packing import Packing
from uft_ds.data.pool import Pool
from uft_ds.data.sources import PreparedData
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.deepspeed_file import deepspeed_config
from uft_ds.engine.engine import Engine, partitioned_loading, with_shards_on_host
from uft_ds.engine.gathering import whole_parameter
from uft_ds.engine.groups import ADAPTERS, HEAD, ParameterGroup, one_group
from uft_ds.engine.ranks import current_ranks
from uft_ds.host.world import launcher_environment
from uft_ds.known.cache import STORED_ROUNDING_NATS, Known
from uft_ds.known.store import LogpTable, ReferenceStore, set_aside
from uft_ds.recipe.settings import Settings
from uft_ds.record.report import Announcer, Speaker
from uft_ds.record.run_folder import RunFolder, reading_identity
from uft_ds.run.checks import check_sharding
from uft_ds.run.prepare import prompts_of
from uft_ds.run.reward_stream import further_streams, with_reward_adapter
from uft_ds.streams.adapters import add_adapters, start_from_adapter, start_policy_from_adapter
from uft_ds.streams.identity import reference_identity, weight_files
from uft_ds.streams.load import ATTENTIONS, decoder_layer_class, load_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.policy import Policy, base_of
from uft_ds.training.evaluate import check_reference_cache
from uft_ds.training.samples import Sampler


def build_engine(settings: Settings, reporter: Announcer) -> tuple[Engine, UFTModel]:
    """Load the base model (shard by shard under ZeRO-3), add the adapters if there are any, and wrap all in the engine.

    Every rank must call it. Warnings about the sharding go to `reporter`, which also tells what is being done.

    Args:
        settings: with a mode of gradient checkpointing that has been chosen.
    """
    recompute = settings.model.gradient_checkpointing
    assert recompute != "auto", "`with_chosen_recompute` comes first"
    dtype = getattr(torch, settings.model.dtype)
    ranks, ranks_per_node = current_ranks().world_size, launcher_environment().ranks_per_node
    for warning in check_sharding(settings, ranks=ranks, ranks_per_node=ranks_per_node):
        reporter.warn(warning)
    config = deepspeed_config(
        settings.deepspeed.checked,
        dtype=dtype,
        max_grad_norm=settings.train.max_grad_norm,
        own_linear=recompute != "selective",  # see `enable_recompute`
    )
    load = partial(
        load_base,
        settings.model.base,
        revision=settings.model.revision,
        dtype=dtype,
        attention=settings.model.attention,
        quantization=settings.model.quantization,
        whole=whole_parameter,
    )
    what = f"{settings.model.base}{_size_of(settings.model.base)}"
    with reporter.phase(f"loading {what}"), partitioned_loading(config):
        base = load(gradient_checkpointing=recompute)
    reference = None
    if settings.copies_reference:
        with reporter.phase(f"loading the reference, {what}"), partitioned_loading(with_shards_on_host(config)):
            reference = load(gradient_checkpointing=False)
    policy = _whole(base) if settings.trains_all else _adapted(base, settings)
    heads = with_reward_adapter(policy, settings)
    model = UFTModel(
        policy,
        reference=reference,
        reference_mode=settings.reference.mode,
        activation_offload=settings.model.activation_offload,
        chunk_bytes=settings.model.logits_bytes,
        further=further_streams(settings, heads),
        seed=settings.train.seed,
        frozen_heads=heads,
    )
    layer_class = decoder_layer_class(base)
    with reporter.phase(f"preparing the engine on {_counted(ranks, 'rank')}"):
        engine = Engine(
            model,
            config,
            layer_class=layer_class,
            weight_decay=settings.train.weight_decay,
            betas=settings.train.betas,
            packing=Packing(
                attention_parity(base.config), settings.data.share_prompts, settings.launch.sequence_parallel
            ),
            collective_timeout_minutes=settings.launch.collective_timeout_minutes,
            groups=_groups_of(model, settings),
        )
    return engine, model


def _whole(base: Any) -> Policy:
    """The base, of which all parameters are trained."""
    base.requires_grad_(True)
    return cast(Policy, base)


def _adapted(base: Any, settings: Settings) -> Policy:
    """The base with adapters: fresh ones, or those that the run starts from."""
    lora = settings.adapters
    policy = add_adapters(
        base,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        dtype=getattr(torch, lora.dtype),
        seed=settings.train.seed,
        experts=lora.experts,
    )
    if settings.reference.adapter is not None:
        start_from_adapter(policy, Path(settings.reference.adapter))
    if settings.start_adapter is not None:
        start_policy_from_adapter(policy, Path(settings.start_adapter))
    return policy


def _groups_of(model: UFTModel, settings: Settings) -> tuple[ParameterGroup, ...]:
    """One group of the adapters; a reward model's head is a second one with its own learning rate."""
    if not settings.trains_head:
        return one_group(model)
    of_head = tuple(model.scores.parameters())
    adapters = tuple(p for p in model.policy.parameters() if p.requires_grad)
    return (ParameterGroup(ADAPTERS, adapters), ParameterGroup(HEAD, of_head, settings.train.head_rate_scale))


def _size_of(base: str) -> str:
    """`: 0.54 GB in 1 file` of a local folder; nothing of a hub name, whose files may have to be fetched."""
    if not Path(base).exists():
        return ""
    files = weight_files(Path(base))
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    return f": {gigabytes:.2g} GB in {_counted(len(files), 'file')}"


def _counted(number: int, word: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def build_reference_cache(
    settings: Settings,
    folder: RunFolder,
    engine: Engine,
    model: UFTModel,
    pools: Seq[Pool],
    reporter: Speaker,
    checkpoint: Path | None = None,
) -> Known:
    """The stored reference log-probs of the run's responses, compared with the reference itself on a sample.

    Only rank 0 reads the store, and broadcasts what it read: another run may add entries at any time, and all ranks
    must know the same ones. Every rank must call it.

    Args:
        checkpoint: the checkpoint that the run resumes from. Its own table is used instead of the store, so that the
            resumed run computes what the unbroken run would have computed; unless another attention computed it.
    """
    if settings.reference.how != "cached":
        return Known.of_reference(settings.reference.how)
    content = _reference_content(folder)
    identities = {
        attention: reference_identity(
            content,
            dtype=settings.model.dtype,
            attention=attention,
            adapter_dtype=settings.adapters.dtype if settings.reference.adapter else None,
        )
        for attention in (*ATTENTIONS, model.attention)
    }
    identity = identities[model.attention]
    store, snapshot = None, [LogpTable()]
    files: tuple[Path, ...] = ()
    if engine.rank == 0:
        store = ReferenceStore.below(settings.reference.cache_dir, identity)
        others = {other: attention for attention, other in identities.items() if other != identity}
        found = None if checkpoint is None else stored_reference(checkpoint, identity, others)
        if checkpoint is not None and isinstance(found, str):
            reporter.warn(
                f"reference cache: attention {found} computed what {checkpoint.name} holds, and rounds differently; it "
                f"is computed anew by {model.attention}, which the run uses now"
            )
        if isinstance(found, dict):
            snapshot[0] = found
        else:
            snapshot[0], files = _read_snapshot(store, pools, reporter)
    torch.distributed.broadcast_object_list(snapshot, src=0)
    dtype = getattr(torch, settings.model.dtype)
    rounding = STORED_ROUNDING_NATS[dtype]
    cache = Known.of_reference(settings.reference.how, snapshot[0], identity=identity, rounding=rounding, store=store)
    check = check_reference_cache(
        engine,
        cache,
        pools,
        tokens_per_micro_batch=settings.train.tokens_per_micro_batch,
        dtype=dtype,
    )
    if check is not None and check.agrees:
        reporter.say(
            f"reference cache: {cache.num_known} responses known; {check.num_responses} compared with the reference "
            f"itself, at most {check.difference:.2g} nats apart"
        )
    elif check is not None:
        renamed = set_aside(files)
        reporter.warn(
            f"reference cache: {check.origin} is {check.difference:.3g} nats from the reference itself, more than "
            f"rounding: none of {cache.num_known} stored values is used; {renamed} of {len(files)} files in "
            f"{settings.reference.cache_dir} renamed, so that no other run reads them"
        )
        cache.forget()
    return cache


def build_sampler(settings: Settings, data: PreparedData, model: UFTModel) -> Sampler | None:
    """The held-out prompts that the policy answers at evaluations; None if the recipe asks for none."""
    if not settings.train.samples:
        return None
    chat = load_tokenizer(
        settings.model.base, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    prompts = prompts_of(settings, data, base_of(model.policy).config)
    return Sampler(prompts, chat, settings.train.sample_tokens, settings.train.tokens_per_micro_batch)


def _reference_content(folder: RunFolder) -> dict[str, Any]:
    """The weights that the reference's log-probs depend on: the identities of base and reference adapter."""
    with reading_identity(folder) as identity:
        return {**identity["base"], "adapter": identity["adapter"]}


def _read_snapshot(store: ReferenceStore, pools: Seq[Pool], reporter: Speaker) -> tuple[LogpTable, tuple[Path, ...]]:
    stored = store.read()
    for problem in stored.problems:
        reporter.warn(f"reference cache: {problem}; its responses are computed again")
    if not stored.table:
        return {}, stored.files
    names = np.array(list(stored.table), dtype=f"V{KEY_BYTES}").view(f"S{KEY_BYTES}")
    is_wanted = np.isin(names, np.concatenate([pool.keys_R for pool in pools]))
    kept = zip(stored.table.items(), is_wanted.tolist(), strict=True)
    return {key: logp for (key, logp), wanted in kept if wanted}, stored.files
