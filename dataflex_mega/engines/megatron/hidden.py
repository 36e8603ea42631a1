"""Hidden states of megatron-core's model: what the last stage's block of layers gives to the output layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dataflex_mega.engines.megatron.checkpoint import bare
from dataflex_mega.engines.megatron.context import Context
from dataflex_mega.engines.megatron.layout import Layout
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals import hidden
from dataflex_mega.types import Batch, HiddenSpec


class Listener:
    """Hears the last hidden states and makes vectors of them, whatever part of the sequence this rank has."""

    def __init__(self, chunks: Sequence[Any], layout: Layout, context: Context) -> None:
        self.chunks, self.layout, self.context = chunks, layout, context

    @contextmanager
    def listening(self, model: Any, spec: HiddenSpec | None) -> Iterator[list[Tensor]]:
        """A list that has the states [s, b, h] after a forward pass of `model` inside, when it is the last chunk and `spec`
        asks for them. Raises ConfigError as `check`."""
        heard: list[Tensor] = []
        gpt = bare(model)
        if spec is None or not gpt.post_process:
            yield heard
            return
        check(spec)
        handle = gpt.decoder.register_forward_hook(lambda _module, _args, output: heard.append(first(output).detach()))
        try:
            yield heard
        finally:
            handle.remove()

    def vectors(self, heard: list[Tensor], batch: Batch, spec: HiddenSpec | None) -> Tensor | None:
        """[n, h] float32, equal on the tensor- and context-parallel ranks; None where nothing was heard."""
        if spec is None or not heard:
            return None
        states = heard[0].transpose(0, 1)
        part = hidden.vectors(states, batch, replace(spec, unit=False), self._places(batch, states.shape[1]))
        if self.layout.sequence_parallel:
            dist.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
        if self.context.size > 1:
            dist.all_reduce(part, group=self.context.group)
        return hidden.unit(part) if spec.unit else part

    def _places(self, batch: Batch, count: int) -> Tensor | None:
        """[count] the positions of the states that this rank has; None: all of them."""
        mine = self.context.share(batch)[1]
        if not self.layout.sequence_parallel:
            return mine
        whole = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) if mine is None else mine
        return whole[parallel_state.get_tensor_model_parallel_rank() * count :][:count]


def check(spec: HiddenSpec) -> None:
    """Raises ConfigError for another layer than the last: no other is sure to be on the stage that sees losses."""
    if spec.layer != -1:
        raise ConfigError(
            f"embed_layer: must be -1 with engine: megatron, found {spec.layer}; engine: fsdp has the others"
        )


def first(output: Any) -> Tensor:
    """The hidden states of a block of layers, which may give more besides."""
    return output[0] if isinstance(output, tuple) else output
