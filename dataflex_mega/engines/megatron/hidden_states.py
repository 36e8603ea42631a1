"""Hidden states of megatron-core's model: what the last stage's block of layers gives to the output layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dataflex_mega.engines.megatron.context import ContextParallel
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.sample_embeddings import l2_normalize, sample_embeddings
from dataflex_mega.types import Batch, EmbeddingSpec


class HiddenStateCapture:
    """Captures the last hidden states and pools them into embeddings, whatever part of the sequence this rank has."""

    def __init__(self, layout: MegatronLayout, context: ContextParallel) -> None:
        self.layout, self.context = layout, context

    @contextmanager
    def capture(self, model: Any, spec: EmbeddingSpec | None) -> Iterator[list[Tensor]]:
        """A list that has the states [s, b, h] after a forward pass of `model` inside, when it is the last chunk and `spec`
        asks for them. Raises ConfigError for another layer than the last."""
        captured: list[Tensor] = []
        gpt = unwrap(model)
        if spec is None or not gpt.post_process:
            yield captured
            return
        check_embedding_layer(spec)
        handle = gpt.decoder.register_forward_hook(
            lambda _module, _args, output: captured.append(block_output(output).detach())
        )
        try:
            yield captured
        finally:
            handle.remove()

    def embeddings(self, captured: list[Tensor], batch: Batch, spec: EmbeddingSpec | None) -> Tensor | None:
        """[n, h] float32, equal on the tensor- and context-parallel ranks; None where nothing was captured."""
        if spec is None or not captured:
            return None
        states = captured[0].transpose(0, 1)
        embeddings = sample_embeddings(
            states, batch, replace(spec, normalize=False), self._positions(batch, states.shape[1])
        )
        if self.layout.sequence_parallel:
            dist.all_reduce(embeddings, group=parallel_state.get_tensor_model_parallel_group())
        if self.context.size > 1:
            dist.all_reduce(embeddings, group=self.context.group)
        return l2_normalize(embeddings) if spec.normalize else embeddings

    def _positions(self, batch: Batch, count: int) -> Tensor | None:
        """[count] positions of the hidden states of this rank; None: all positions."""
        positions = self.context.shard(batch)[1]
        if not self.layout.sequence_parallel:
            return positions
        if positions is None:
            positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        return positions[parallel_state.get_tensor_model_parallel_rank() * count :][:count]


def check_embedding_layer(spec: EmbeddingSpec) -> None:
    """Raises ConfigError for another layer than the last: no other is sure to be on the stage that sees losses."""
    if spec.layer != -1:
        raise ConfigError(
            f"embed_layer: must be -1 with engine: megatron, found {spec.layer}; use engine: fsdp for others"
        )


def block_output(output: Any) -> Tensor:
    """The hidden states in the output of a block of layers, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output
