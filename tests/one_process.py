"""An engine of one process without DeepSpeed, for tests and benchmarks of what is done with a policy's answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class OneProcess:
    """What generators ask of `uft_ds.engine.engine.Engine`, on one rank that holds all weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.device = torch.device("cpu")
        self.rank, self.world_size = 0, 1
        self.gathers_layers = False

    def agree(self, value: int) -> int:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield
