"""A SignalContext for tests: one process, no engine unless one is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.providers.context import SignalContext


def rank_info(rank: int = 0, ranks: int = 1) -> Any:
    """A process that is one of `ranks`, which never communicates."""
    return SimpleNamespace(
        rank=rank, world_size=1, dp_rank=rank, dp_size=ranks, pipeline_stages=1, device=torch.device("cpu"),
        is_main=rank == 0,
    )  # fmt: skip


def signal_context(pool: SamplePool, engine: Any = None, **changes: Any) -> SignalContext:
    info = changes.pop("parallel_info", rank_info())
    fields = {
        "parallel_info": info,
        "collectives": TorchCollectives(info),
        "pool": pool,
        "evaluation": {},
        "collate": lambda samples, pack_length=None: collate(samples, 0, pack_length),
        "batch_size": 2,
        "seed": 5,
        "engine": engine,
        "tokenizer": None,
        "output_dir": Path("unused"),
        "cutoff_len": 64,
        "report": lambda line: None,
    }
    return SignalContext(**{**fields, **changes})
