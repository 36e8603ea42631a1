"""megatron-core's routers: which expert a token goes to, counted in the training forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.router_load import RouterLoadCounter, token_domains
from dataflex_mega.types import Batch


class MegatronRouterCounter:
    """Counts tokens per expert in the routers of this stage's chunks. Raises ConfigError for a model without experts."""

    def __init__(self, chunks: Sequence[Any], layout: MegatronLayout) -> None:
        self.config, self.layout = chunks[0].config, layout
        if not self.config.num_moe_experts:
            raise ConfigError("mixer: needs a mixture of experts, and the model has none")
        self.routers_by_chunk = {
            id(unwrap(chunk)): [m for m in chunk.modules() if isinstance(m, TopKRouter)] for chunk in chunks
        }
        self._counter: RouterLoadCounter | None = None  # set while forward passes are to be counted

    def new_counter(self, num_domains: int, device: Any) -> RouterLoadCounter:
        """A counter of one step, all zero."""
        return RouterLoadCounter(self.config.num_layers, num_domains, self.config.num_moe_experts, device)

    @contextmanager
    def recording(self, counter: RouterLoadCounter) -> Iterator[None]:
        """Inside, `counting` adds to `counter`.

        With sequence parallelism each tensor-parallel rank sees its own positions, with context parallelism each rank that
        shares rows, and their counts are summed at the end; without either all ranks see all of them.
        """
        self._counter = counter
        try:
            yield
        finally:
            self._counter = None
        if self.layout.sequence_parallel:
            dist.all_reduce(counter.counts, group=parallel_state.get_tensor_model_parallel_group())
        if self.layout.context > 1:
            dist.all_reduce(counter.counts, group=parallel_state.get_context_parallel_group())

    @contextmanager
    def counting(self, model: Any, batch: Batch) -> Iterator[None]:
        """Count a forward pass of one chunk inside. A pass that is repeated in the backward pass lies outside."""
        if self._counter is None:
            yield
            return
        domain = self._domains(batch)
        handles = [
            module.register_forward_hook(self._forward_hook(module, domain, self._counter))
            for module in self.routers_by_chunk[id(unwrap(model))]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _domains(self, batch: Batch) -> Tensor:
        """[t] in the order of the routers, position by position and row by row within one: those of this rank."""
        domain = token_domains(batch).transpose(0, 1)
        if self.layout.sequence_parallel:
            domain = domain.chunk(self.layout.tensor)[parallel_state.get_tensor_model_parallel_rank()]
        return domain.flatten()

    def _forward_hook(self, router: Any, domain: Tensor, counter: RouterLoadCounter) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            counter.add(int(router.layer_number) - 1, output[1], domain)

        return hook
