"""Chunks, buckets, optimizer and scheduler put together. Callers must be inside cpu.cuda_calls_on_cpu()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.engine import MegatronEngine
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.lr_adapter import LRSchedulerAdapter
from dataflex_mega.engines.megatron.model import create_chunks, seed_everything
from dataflex_mega.engines.megatron.runner import MegatronModelRunner
from dataflex_mega.engines.megatron.settings import MegatronSettings
from dataflex_mega.engines.megatron.wrapping import wrap_ddp
from dataflex_mega.engines.options import StepOptions

# Layers -> the dimension along which tensor parallelism splits their weight.
TENSOR_PARALLEL_DIMS = (((ColumnParallelLinear, VocabParallelEmbedding), 0), ((RowParallelLinear,), 1))


def build_chunks(decoder: DecoderConfig, settings: MegatronSettings, seed: int) -> list[Any]:
    """This stage's bare chunks, on the device, not yet filled."""
    seed_everything(seed)
    chunks: list[Any] = list(
        create_chunks(decoder, settings.model, settings.transformer_engine, settings.torch_attention)
    )
    for chunk in chunks:
        for module in chunk.modules():
            _mark_tensor_parallel(module)
    return chunks


def _mark_tensor_parallel(module: nn.Module) -> None:
    """Mark a weight as one of several shards. megatron-core does so while it initialises weights, which here come
    from elsewhere; a weight without the mark counts once for all tensor-parallel ranks in the gradient's norm."""
    dimension = next((d for kinds, d in TENSOR_PARALLEL_DIMS if isinstance(module, kinds)), None)
    if dimension is None:
        return
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        is_split = parameter is not None and not (name == "bias" and dimension == 1)  # a row-parallel bias is whole
        if is_split and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dimension, stride=1)


def build_engine(
    chunks: list[Any],
    settings: MegatronSettings,
    layout: MegatronLayout,
    parallel_info: ParallelInfo,
    options: StepOptions,
    build_scheduler: Callable[[torch.optim.Optimizer], Any],
    score_micro_batch_rows: int,
    exporter: Callable[[list[Any], Path], None],
) -> MegatronEngine:
    """The engine around filled chunks.

    Args:
        build_scheduler: an optimizer -> its learning-rate scheduler, as torch and transformers make them.
        score_micro_batch_rows: rows of a micro-batch of gradient scores.
        exporter: (chunks, folder) writes the model in Hugging Face layout.
    """
    wrapped = wrap_ddp(chunks, settings)
    optimizer = get_megatron_optimizer(settings.optimizer, wrapped)
    lr_scheduler = LRSchedulerAdapter(
        optimizer, settings.optimizer.lr or 0.0, settings.optimizer.weight_decay, build_scheduler
    )
    runner = MegatronModelRunner(wrapped, parallel_info, layout, options.count_router_loads, options.loss_form)
    return MegatronEngine(runner, optimizer, lr_scheduler, options, score_micro_batch_rows, exporter)
