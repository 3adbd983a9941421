"""The policy as it is handed to a generator: its adapter, gathered once for each step, and the hash that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uft_ds.engine.engine import Engine
from uft_ds.rollouts.answers import PolicyVersion
from uft_ds.streams.adapters import adapter_tensors
from uft_ds.streams.policy import Policy, adapted


@dataclass(frozen=True)
class Handover:
    """A version of the policy. tensors: its whole adapter by PEFT's names, on the host; empty on other ranks than 0."""

    version: PolicyVersion
    tensors: Mapping[str, Tensor]


def take_policy(engine: Engine, policy: Policy, step: int) -> Handover:
    """The present policy. Every rank must call it: nothing but the adapter is gathered.

    Args:
        step: number of optimiser steps so far.
    """
    tensors: dict[str, Tensor] = {}
    with engine.gathered_trainable() as trained:
        if engine.rank == 0:
            own = adapter_tensors(adapted(policy), trained)
            tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in own.items()}
    digest = engine.from_first(digest_of(tensors) if engine.rank == 0 else "")
    return Handover(PolicyVersion(step, digest), tensors)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hex, of an adapter's names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
