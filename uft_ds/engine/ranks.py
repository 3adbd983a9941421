"""The ranks of a run by their role: the only module that asks torch for the size of the world.

    global rank = data_rank * sequence_size + sequence_rank

Ranks that share sequences are neighbours, so that they lie in one node. All ranks of a data rank hold the same
micro-batches, and after the forward the same log-probs for each response: whoever counts terms, losses or rows over the
run counts each data rank once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch

from uft_ds.engine.accelerator import choose_accelerator
from uft_ds.errors import UserError
from uft_ds.host.world import check_launched, launcher_environment


@dataclass(frozen=True)
class Ranks:
    """This rank's place. data: which part of a step it packs. sequence: which part of each sequence it computes.

    Raises:
        ValueError: a rank lies outside of its size.
    """

    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1

    def __post_init__(self) -> None:
        for role, rank, size in (
            ("data", self.data_rank, self.data_size),
            ("sequence", self.sequence_rank, self.sequence_size),
        ):
            if not 0 <= rank < size:
                raise ValueError(f"{role} rank {rank} of {size}: expected a rank from 0 to {size - 1}")

    @property
    def rank(self) -> int:
        """Among all ranks of the run."""
        return self.data_rank * self.sequence_size + self.sequence_rank

    @property
    def world_size(self) -> int:
        return self.data_size * self.sequence_size

    @property
    def is_first(self) -> bool:
        """Whether it is the one rank that writes the run's files."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether it speaks for its data rank where values are added up over the run."""
        return self.sequence_rank == 0

    @property
    def loss_factor(self) -> int:
        """What a loss is multiplied by before DeepSpeed's backward, so that the gradient is the sum over data ranks.

        DeepSpeed divides by the data ranks alone: ZeRO divides the sum over all ranks by world size / sequence size
        (0.19.8, zero/stage3.py:1878 and zero/stage_1_and_2.py:1688).
        """
        return self.data_size


def ranks_of(rank: int, world_size: int, *, sequence_size: int = 1) -> Ranks:
    """The place of a global rank.

    Raises:
        ValueError: the world is not a multiple of `sequence_size`.
    """
    if world_size % sequence_size:
        raise ValueError(f"{world_size} ranks cannot be divided into groups of {sequence_size} that share sequences")
    data_rank, sequence_rank = divmod(rank, sequence_size)
    return Ranks(data_rank, world_size // sequence_size, sequence_rank, sequence_size)


def current_ranks(sequence_size: int = 1) -> Ranks:
    """This process's place, once `init_distributed` has joined the process group."""
    return ranks_of(torch.distributed.get_rank(), torch.distributed.get_world_size(), sequence_size=sequence_size)


def init_distributed(timeout_minutes: float) -> None:
    """Join the process group that the launcher described in the environment.

    Raises:
        UserError: the launcher's variables are missing, or its port is taken.
    """
    check_launched()
    launched = launcher_environment()
    choose_accelerator()
    import deepspeed
    import deepspeed.ops
    from torch.distributed import DistNetworkError

    # On a CPU this op would be compiled at every first start, only to serve inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(launched.local_rank)
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    except DistNetworkError as error:
        raise UserError(
            f"port {launched.master_port} of {launched.master_address} cannot be used "
            f"({str(error).splitlines()[0]}); give another one by --master_port or MASTER_PORT"
        ) from None


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launcher_environment().local_rank)
