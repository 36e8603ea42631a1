"""Which process this is, on which device, and how many share the data."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """The job as one process sees it. Only data parallelism here: the data-parallel rank is the global rank."""

    rank: int
    world: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        """Which share of a global batch is this process's."""
        return self.rank

    @property
    def dp_size(self) -> int:
        """Into how many shares a global batch is cut."""
        return self.world

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0


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
    return Mesh(rank, world, device)


def stop(orderly: bool) -> None:
    """Leave the process group. After an `orderly` end all ranks wait for each other first: gloo aborts a process that
    leaves while another still talks to it. After an error nobody waits."""
    if dist.is_initialized():
        if orderly:
            dist.barrier()
        dist.destroy_process_group()
