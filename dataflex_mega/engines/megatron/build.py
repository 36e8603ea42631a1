"""Chunks, buckets, optimizer and schedule put together. Enter cpu.redirected() around every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from torch import nn

from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.engines.megatron.engine import MegatronEngine
from dataflex_mega.engines.megatron.layout import Layout
from dataflex_mega.engines.megatron.lr_adapter import Rates
from dataflex_mega.engines.megatron.model import build_chunks, seed_everything
from dataflex_mega.engines.megatron.settings import Settings
from dataflex_mega.engines.megatron.shape import Shape
from dataflex_mega.engines.options import Options

# Layers -> the dimension along which tensor parallelism cuts their weight.
CUT_ALONG = (((ColumnParallelLinear, VocabParallelEmbedding), 0), ((RowParallelLinear,), 1))


def chunks_of(shape: Shape, settings: Settings, seed: int) -> list[Any]:
    """This stage's bare chunks, on the device, not yet filled."""
    seed_everything(seed)
    chunks: list[Any] = list(build_chunks(shape, settings.model, settings.transformer_engine, settings.own_attention))
    for chunk in chunks:
        for module in chunk.modules():
            _mark(module)
    return chunks


def _mark(module: nn.Module) -> None:
    """Say of a weight that it is one of several parts. megatron-core does so while it initialises weights, which here come
    from elsewhere; a weight without the mark counts once for all tensor-parallel ranks in the gradient's norm."""
    dimension = next((d for kinds, d in CUT_ALONG if isinstance(module, kinds)), None)
    if dimension is None:
        return
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        cut = parameter is not None and not (name == "bias" and dimension == 1)  # a row-parallel bias is whole
        if cut and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dimension, stride=1)


def wrap(chunks: list[Any], settings: Settings) -> list[Any]:
    """Filled chunks -> the same in the run's precision, with gradient buckets for data parallelism."""
    mixed, device = settings.model.bf16 or settings.model.fp16, torch.cuda.current_device()
    for chunk in chunks:
        chunk.to(device)  # weights were read into the host's memory; the optimizer takes none of those there
    inside = [Float16Module(settings.model, chunk) if mixed else chunk for chunk in chunks]
    return [
        DistributedDataParallel(
            config=settings.model, ddp_config=settings.ddp, module=chunk, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(inside)
    ]


def assemble(
    chunks: list[Any],
    settings: Settings,
    layout: Layout,
    mesh: Mesh,
    options: Options,
    schedule: Callable[[torch.optim.Optimizer], Any],
    micro_rows: int,
    writer: Callable[[list[nn.Module], Any], None],
) -> MegatronEngine:
    """The engine around filled chunks.

    Args:
        schedule: an optimizer -> its learning-rate schedule, as torch and transformers make them.
        micro_rows: rows of a micro-batch of gradient scores.
        writer: (chunks, folder) writes the model in Hugging Face layout.
    """
    wrapped = wrap(chunks, settings)
    optimizer = get_megatron_optimizer(settings.optimizer, wrapped)
    rates = Rates(optimizer, settings.optimizer.lr or 0.0, settings.optimizer.weight_decay, schedule)
    return MegatronEngine(wrapped, optimizer, rates, mesh, layout, options, micro_rows, writer)
