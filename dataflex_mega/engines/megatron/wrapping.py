"""The wrappers of precision and data parallelism around a chunk: adding and unwrapping them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from dataflex_mega.engines.megatron.settings import MegatronSettings


def wrap_ddp(chunks: list[Any], settings: MegatronSettings) -> list[Any]:
    """Filled chunks -> the same in the run's precision, with gradient buckets for data parallelism."""
    mixed, device = settings.model.bf16 or settings.model.fp16, torch.cuda.current_device()
    for chunk in chunks:
        chunk.to(device)  # weights were read into the host's memory; the optimizer takes none of those there
    modules = [Float16Module(settings.model, chunk) if mixed else chunk for chunk in chunks]
    return [
        DistributedDataParallel(
            config=settings.model, ddp_config=settings.ddp, module=module, disable_bucketing=number > 0
        )
        for number, module in enumerate(modules)
    ]


def unwrap(chunk: Any) -> Any:
    """A chunk without the wrappers of data parallelism and precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
