"""How a model is sharded over processes, checked from the configuration alone; nothing of megatron-core is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.errors import ConfigError


@dataclass(frozen=True)
class MegatronLayout:
    """Sizes of the parallel dimensions. world_size = tensor x pipeline x context x data."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    interleaved: int = 1  # chunks of layers a pipeline rank holds
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False

    @property
    def data(self) -> int:
        """The number of data-parallel shares of a global batch. Experts do not divide it."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def length_multiple(self) -> int:
        """What the width of a batch must be a multiple of: context parallelism splits it into two chunks per rank."""
        chunks = 2 * self.context if self.context > 1 else 1
        return math.lcm(8, chunks * (self.tensor if self.sequence_parallel else 1))

    def describe(self) -> str:
        """`TP2 x PP2 x DP1`, for messages."""
        parts = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "EP": self.expert, "DP": self.data}
        named = [f"{name}{size}" for name, size in parts.items() if size > 1 or name == "DP"]
        if self.interleaved > 1:
            named.append(f"{self.interleaved} chunks per stage")
        return " x ".join(named) + (", sequence parallel" if self.sequence_parallel else "")


def read_layout(keys: Any, world: int) -> MegatronLayout:
    """`keys`: config.megatron.MegatronArguments. Raises ConfigError when the sizes do not make up `world` processes."""
    tensor, pipeline, context = (
        keys.tensor_model_parallel_size,
        keys.pipeline_model_parallel_size,
        keys.context_parallel_size,
    )
    parts = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    if context > 1:
        parts["context_parallel_size"] = context
    product = math.prod(parts.values())
    if world % product:
        sizes = " x ".join(f"{key.partition('_')[0]} {size}" for key, size in parts.items())
        raise ConfigError(
            f"{', '.join(parts)}: {sizes} = {product} does not divide the {world} process{'es' if world > 1 else ''} of "
            "this run"
        )
    expert = keys.expert_model_parallel_size
    expert_tensor = keys.expert_tensor_parallel_size or (tensor if expert == 1 else 1)
    if world % (expert * expert_tensor * pipeline):
        raise ConfigError(
            f"expert_model_parallel_size: experts {expert} x expert tensor {expert_tensor} x pipeline {pipeline} does not "
            f"divide the {world} processes of this run"
        )
    if keys.sequence_parallel and tensor == 1:
        raise ConfigError("sequence_parallel: needs tensor_model_parallel_size > 1, found 1")
    return MegatronLayout(
        world,
        tensor,
        pipeline,
        keys.virtual_pipeline_model_parallel_size or 1,
        context,
        expert,
        expert_tensor,
        keys.sequence_parallel,
    )


def check_layout(
    layout: MegatronLayout, decoder: DecoderConfig, keys: Any, grad_accumulation: int, length: int
) -> None:
    """Raise ConfigError where the model cannot be sharded like that.

    Args:
        grad_accumulation: micro-batches of a step and data-parallel rank.
        length: the longest sequence in tokens.
    """
    _check_tensor(layout, decoder)
    _check_pipeline(layout, decoder, keys, grad_accumulation)
    _check_experts(layout, decoder, keys)
    if decoder.sliding_window is not None and length > decoder.sliding_window:
        raise ConfigError(
            f"cutoff_len: {length} is beyond the model's sliding_window of {decoder.sliding_window}, and attention here is "
            "over the whole sequence"
        )


def _check_tensor(layout: MegatronLayout, decoder: DecoderConfig) -> None:
    for what, size in (
        ("attention heads", decoder.num_heads),
        ("key-value heads", decoder.num_kv_heads),
        ("hidden units", decoder.hidden_size),
        ("units of an MLP", decoder.ffn_hidden_size),
    ):
        if size % layout.tensor:
            raise ConfigError(f"tensor_model_parallel_size: {layout.tensor} does not divide the model's {size} {what}")


def _check_pipeline(layout: MegatronLayout, decoder: DecoderConfig, keys: Any, grad_accumulation: int) -> None:
    if layout.interleaved > 1 and layout.pipeline == 1:
        raise ConfigError("virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size > 1, found 1")
    counted = (
        decoder.num_layers + keys.account_for_embedding_in_pipeline_split + keys.account_for_loss_in_pipeline_split
    )
    stages = layout.pipeline * layout.interleaved
    if keys.pipeline_model_parallel_layout is None and counted % stages:
        raise ConfigError(
            f"pipeline_model_parallel_size: {layout.pipeline} stages of {layout.interleaved} chunks do not divide the "
            f"model's {counted} layers; pipeline_model_parallel_layout can name the layers of each stage"
        )
    if layout.interleaved > 1 and grad_accumulation % layout.pipeline:
        raise ConfigError(
            f"gradient_accumulation_steps: {grad_accumulation} is no multiple of pipeline_model_parallel_size "
            f"{layout.pipeline}, as interleaved stages need"
        )


def _check_experts(layout: MegatronLayout, decoder: DecoderConfig, keys: Any) -> None:
    if decoder.experts is None:
        if layout.expert > 1:
            raise ConfigError(f"expert_model_parallel_size: {layout.expert}, but a {decoder.model_type} has no experts")
        return
    if decoder.experts.num_experts % layout.expert:
        raise ConfigError(
            f"expert_model_parallel_size: {layout.expert} does not divide the model's {decoder.experts.num_experts} experts"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise ConfigError("sequence_parallel: a mixture of experts with tensor_model_parallel_size > 1 needs it")
    if decoder.experts.ffn_hidden_size % layout.expert_tensor:
        raise ConfigError(
            f"expert_tensor_parallel_size: {layout.expert_tensor} does not divide the "
            f"{decoder.experts.ffn_hidden_size} units of an expert"
        )
    if keys.moe_token_dispatcher_type == "flex":
        raise ConfigError(
            "moe_token_dispatcher_type: flex needs DeepEP, which is not supported; use alltoall or allgather"
        )
