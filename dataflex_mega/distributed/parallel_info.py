"""The rank, device and data-parallel group of this process; starting and leaving torch.distributed."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dataflex_mega.distributed.orphans import die_with_launcher
from dataflex_mega.distributed.peers import end_watch, watch_peers
from dataflex_mega.errors import ConfigError

DEFAULT_TIMEOUT = timedelta(minutes=30)  # of a collective: a process may read data that long while others wait
UNLIMITED = (1800, 180000000)  # what Hugging Face and LLaMA-Factory set ddp_timeout to where the configuration does not


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


def timeout_of(keys: Mapping[str, Any]) -> timedelta | None:
    """How long a collective may wait, from the key `ddp_timeout`; None where it has its default, which is years."""
    seconds = keys.get("ddp_timeout")
    return None if seconds is None or seconds in UNLIMITED else timedelta(seconds=float(seconds))


def hide_accelerators() -> None:
    """Let this process see no GPU, from here on, whatever asks for one. Raises ConfigError when it has used one already."""
    if torch.cuda.is_initialized():
        raise ConfigError("use_cpu: this process has used a GPU already; set CUDA_VISIBLE_DEVICES= before it starts")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def init_distributed(timeout: timedelta | None = None) -> ParallelInfo:
    """Join the process group that torchrun describes, or create one of a single process. Safe to call twice.

    `timeout`: how long a collective may wait for another process; None: DEFAULT_TIMEOUT. A process that torchrun started
    ends with torchrun from here on.
    """
    die_with_launcher()
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
            dist.init_process_group(backend, timeout=timeout or DEFAULT_TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    set_timeouts(timeout or DEFAULT_TIMEOUT)
    watch_peers(timeout)
    return data_parallel(rank, world_size, device)


def set_timeouts(timeout: timedelta) -> None:
    """Let every process group that exists, whoever made it, wait that long and no longer."""
    if dist.get_world_size() > 1:
        with warnings.catch_warnings(action="ignore"):  # about backends that have no timeout
            for group in list(distributed_c10d._world.pg_map):
                distributed_c10d._set_pg_timeout(timeout, group)


def shutdown_distributed(orderly: bool) -> None:
    """Leave the process group. After an `orderly` end all ranks wait for each other first, since gloo aborts a process whose
    peer leaves while they communicate. After an error no rank waits."""
    if dist.is_initialized():
        if orderly:
            dist.barrier()
        end_watch()
        with _ends_in_time():
            dist.destroy_process_group()


@contextmanager
def _ends_in_time(seconds: float = 20.0) -> Iterator[None]:
    """End the program when a block, which waits for processes that may be gone, takes longer."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
