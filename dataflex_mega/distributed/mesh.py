"""Which process this is, on which device, and how many share the data."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """The job as one process sees it.

    Ranks with one `dp_rank` (tensor- and pipeline-parallel ones) see the same samples. Without such ranks the
    data-parallel rank is the global rank and `dp_group` is None: everybody.
    """

    rank: int
    world: int
    device: torch.device
    dp_rank: int  # which share of a global batch is this process's
    dp_size: int  # into how many shares a global batch is cut
    dp_group: dist.ProcessGroup | None = None  # the ranks that hold the shares of this process's model copy
    stage_group: dist.ProcessGroup | None = None  # dp_group times the pipeline: one rank for each share and stage
    stages: int = 1  # pipeline stages; only the last one sees losses

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0


def data_parallel(rank: int, world: int, device: torch.device) -> Mesh:
    """Every rank has its own share."""
    return Mesh(rank, world, device, dp_rank=rank, dp_size=world)


def start() -> Mesh:
    """Join the process group that torchrun describes, or make one of a single process. Safe to call twice."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
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
    return data_parallel(rank, world, device)


def stop(orderly: bool) -> None:
    """Leave the process group. After an `orderly` end all ranks wait for each other first: gloo aborts a process that
    leaves while another still talks to it. After an error nobody waits."""
    if dist.is_initialized():
        if orderly:
            dist.barrier()
        dist.destroy_process_group()
