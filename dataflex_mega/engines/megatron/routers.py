"""megatron-core's routers: which expert a token goes to, heard in the training forward pass."""

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
    """The routers of this stage's chunks. Raises ConfigError for a model without experts."""

    def __init__(self, chunks: Sequence[Any], layout: MegatronLayout) -> None:
        self.config, self.layout = chunks[0].config, layout
        if not self.config.num_moe_experts:
            raise ConfigError("mixer: needs a mixture of experts, and the model has none")
        self.routers_by_chunk = {
            id(unwrap(chunk)): [m for m in chunk.modules() if isinstance(m, TopKRouter)] for chunk in chunks
        }
        self.sums: RouterLoadCounter | None = None  # set while forward passes are to be counted

    def new_counter(self, domains: int, device: Any) -> RouterLoadCounter:
        """Counts of a step, still zero."""
        return RouterLoadCounter(self.config.num_layers, domains, self.config.num_moe_experts, device)

    @contextmanager
    def recording(self, sums: RouterLoadCounter) -> Iterator[None]:
        """Inside, `counting` adds to `sums`.

        With sequence parallelism each tensor-parallel rank sees its own positions, with context parallelism each rank that
        shares rows, and their counts are summed at the end; without either all ranks see all of them.
        """
        self.sums = sums
        try:
            yield
        finally:
            self.sums = None
        if self.layout.sequence_parallel:
            dist.all_reduce(sums.counts, group=parallel_state.get_tensor_model_parallel_group())
        if self.layout.context > 1:
            dist.all_reduce(sums.counts, group=parallel_state.get_context_parallel_group())

    @contextmanager
    def counting(self, model: Any, batch: Batch) -> Iterator[None]:
        """Count a forward pass of one chunk inside. A pass that is repeated in the backward pass lies outside."""
        if self.sums is None:
            yield
            return
        domain = self._domains(batch)
        handles = [
            module.register_forward_hook(self._forward_hook(module, domain, self.sums))
            for module in self.routers_by_chunk[id(unwrap(model))]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _domains(self, batch: Batch) -> Tensor:
        """[t] in the order of the routers, position by position and row by row within one: this rank's part of them."""
        domain = token_domains(batch).transpose(0, 1)
        if self.layout.sequence_parallel:
            domain = domain.chunk(self.layout.tensor)[parallel_state.get_tensor_model_parallel_rank()]
        return domain.flatten()

    def _forward_hook(self, router: Any, domain: Tensor, sums: RouterLoadCounter) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            sums.add(int(router.layer_number) - 1, output[1], domain)

        return hook
