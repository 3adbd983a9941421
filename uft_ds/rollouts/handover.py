"""The policy as it is handed to a generator: its adapter, gathered once for each step, and the hash that names it.

Where all parameters are trained, only the ranks themselves answer: nothing is gathered but the hashes of their shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uft_ds.engine.engine import Engine
from uft_ds.rollouts.answers import PolicyVersion
from uft_ds.streams.adapters import adapter_tensors
from uft_ds.streams.policy import Policy, adapted, trains_all
from uft_ds.streams.weights import own_values


@dataclass(frozen=True)
class Handover:
    """A version of the policy.

    tensors: its whole adapter by PEFT's names, on the host; empty on other ranks than 0, and if it has none.
    """

    version: PolicyVersion
    tensors: Mapping[str, Tensor]


def take_policy(engine: Engine, policy: Policy, step: int) -> Handover:
    """The present policy. Every rank must call it: nothing but the adapter is gathered.

    The hash of a policy without an adapter is that of all ranks' shards, so another number of ranks gives another one.

    Args:
        step: number of optimiser steps so far.
    """
    if trains_all(policy):
        own = digest_of({name: own_values(parameter) for name, parameter in policy.named_parameters()})
        of_ranks = "".join(engine.gather_objects(own))
        return Handover(PolicyVersion(step, hashlib.sha256(of_ranks.encode()).hexdigest()), {})
    tensors: dict[str, Tensor] = {}
    with engine.gathered_trainable() as trained:
        if engine.rank == 0:
            named = adapter_tensors(adapted(policy), trained)
            tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in named.items()}
    digest = engine.from_first(digest_of(tensors) if engine.rank == 0 else "")
    return Handover(PolicyVersion(step, digest), tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hex, of the names, types, shapes and bits of an adapter or of a rank's shards."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
