"""The rank, device and data-parallel group of this process; starting and leaving torch.distributed."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelInfo:
    """The job as one process sees it.

    Tensor- and pipeline-parallel ranks with one `dp_rank` see the same samples. Without such ranks the data-parallel rank is
    the global rank, and `dp_group` is None: the default group of all processes.
    """

    rank: int
    world_size: int
    device: torch.device
    dp_rank: int  # which part of a global batch this process trains on
    dp_size: int  # into how many parts a global batch is divided
    dp_group: dist.ProcessGroup | None = None  # the ranks with the other parts, one for each
    dp_pp_group: dist.ProcessGroup | None = None  # dp_group times the pipeline: one rank per part and stage
    pipeline_stages: int = 1  # only the last stage sees losses

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0


def data_parallel(rank: int, world_size: int, device: torch.device) -> ParallelInfo:
    """Pure data parallelism: every rank is a data-parallel rank."""
    return ParallelInfo(rank, world_size, device, dp_rank=rank, dp_size=world_size)


def init_distributed() -> ParallelInfo:
    """Join the process group that torchrun describes, or create one of a single process. Safe to call twice."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return data_parallel(rank, world_size, device)


def shutdown_distributed(orderly: bool) -> None:
    """Leave the process group. After an `orderly` end all ranks wait for each other first, since gloo aborts a process whose
    peer leaves while they communicate. After an error no rank waits."""
    if dist.is_initialized():
        if orderly:
            dist.barrier()
        dist.destroy_process_group()


@contextmanager
def process_group_scope() -> Iterator[None]:
    """For calls from Python, inside which processes may be joined.

    A group of one process that did not exist before ends with the block. That of torchrun stays until the program ends,
    since a process cannot leave a gloo group and safely join another.
    """
    existed = dist.is_initialized()
    try:
        yield
    finally:
        if not existed and dist.is_initialized():
            if dist.get_world_size() == 1:
                shutdown_distributed(orderly=True)
            else:
                atexit.register(shutdown_distributed, orderly=True)
