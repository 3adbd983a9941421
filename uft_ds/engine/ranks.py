"""The roles of the ranks of a run. Only this module turns the world size into roles.

    global rank = data_rank * sequence_size + sequence_rank

Ranks that share sequences have neighbouring numbers, so that they are in one node. All ranks of a data rank hold the
same micro-batches and, after the forward, the same log-probs of each response. A sum of terms, losses or rows over the
run must therefore count each data rank once.

`launch.sequence_parallel` of a recipe is the number of ranks that share sequences, by default 1: a rank is a data rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch

from uft_ds.engine.accelerator import import_deepspeed
from uft_ds.errors import UserError
from uft_ds.host.world import check_launched, launcher_environment
from uft_ds.streams.divided import SequenceGroup


@dataclass(frozen=True)
class Ranks:
    """The roles of one rank.

    data_rank: which part of a step this rank packs. sequence_rank: which part of each row it computes.

    Raises:
        ValueError: a rank is outside 0 .. size - 1.
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
        """The global rank."""
        return self.data_rank * self.sequence_size + self.sequence_rank

    @property
    def world_size(self) -> int:
        """The number of all ranks of the run."""
        return self.data_size * self.sequence_size

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that writes the run's files."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether this rank contributes its data rank's values to sums over the run."""
        return self.sequence_rank == 0

    @property
    def loss_factor(self) -> int:
        """The factor of a loss before DeepSpeed's backward, which makes the gradient the sum over all ranks.

        ZeRO divides that sum by their number: it is not told that some ranks share sequences. Each of these contributes
        the gradient of its own part of the rows, although all of them compute the same loss.
        """
        return self.world_size


def ranks_of(rank: int, world_size: int, *, sequence_size: int = 1) -> Ranks:
    """The roles of a global rank.

    Raises:
        ValueError: the world size is not a multiple of `sequence_size`.
    """
    if world_size % sequence_size:
        raise ValueError(f"{world_size} ranks cannot be divided into groups of {sequence_size} that share sequences")
    data_rank, sequence_rank = divmod(rank, sequence_size)
    return Ranks(data_rank, world_size // sequence_size, sequence_rank, sequence_size)


def current_ranks(sequence_size: int = 1) -> Ranks:
    """The roles of this process. `init_distributed` must have joined the process group before."""
    return ranks_of(torch.distributed.get_rank(), torch.distributed.get_world_size(), sequence_size=sequence_size)


def sequence_group(ranks: Ranks) -> SequenceGroup:
    """The ranks that share this rank's sequences. Every rank must call it: each makes the groups of all."""
    groups = [
        torch.distributed.new_group([data_rank * ranks.sequence_size + other for other in range(ranks.sequence_size)])
        for data_rank in range(ranks.data_size)
    ]
    return SequenceGroup(groups[ranks.data_rank], ranks.sequence_rank, ranks.sequence_size)


_STORE_WAS_LOST = "Connection was likely closed"
"""Part of what torch's TCPStore says to a client whose server, rank 0, was killed while the others waited for it."""


def init_distributed(timeout_minutes: float) -> None:
    """Join the process group that the launcher describes in environment variables.

    Args:
        timeout_minutes: of each collective.
    Raises:
        UserError: the launcher's variables are missing, or its port cannot be used.
        DistNetworkError: the rank that holds the store was lost meanwhile.
    """
    check_launched()
    launched = launcher_environment()
    import_deepspeed()
    import deepspeed
    from torch.distributed import DistNetworkError

    if torch.cuda.is_available():
        torch.cuda.set_device(launched.local_rank)
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)
    except DistNetworkError as error:
        if _STORE_WAS_LOST in str(error):
            raise  # a crash, after which Slurm starts the job again: nothing is wrong with the port
        raise UserError(
            f"port {launched.master_port} of {launched.master_address} cannot be used "
            f"({str(error).splitlines()[0]}); give another one by --master_port or MASTER_PORT"
        ) from None


def local_device() -> torch.device:
    """This rank's GPU, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launcher_environment().local_rank)
