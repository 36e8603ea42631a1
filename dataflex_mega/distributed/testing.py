"""Run a function in real gloo processes, for tests."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from dataflex_mega.distributed.orphans import die_with_parent
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed


def free_port() -> int:
    """A TCP port on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_distributed_test(
    function: Callable[..., Any], world_size: int, *args: Any, start_method: str = "spawn"
) -> list[Any]:
    """Call `function(parallel_info, *args)` in `world_size` new processes joined by gloo -> their results in rank order.

    `function` must be importable (defined at module level); its result goes through torch.save. An exception in any
    process ends all of them and is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        entry_args = (world_size, free_port(), folder, function, args)
        mp.start_processes(_entry, entry_args, nprocs=world_size, join=True, start_method=start_method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _entry(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    die_with_parent(os.getppid())
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    parallel_info = init_distributed()
    torch.save(function(parallel_info, *args), Path(folder) / f"{rank}.pt")
    shutdown_distributed(orderly=True)
