"""Counts of the tokens of each domain that a mixture of experts sends to each expert, taken while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import Batch


@dataclass
class RouterLoadCounter:
    """Counts of one rank in one step: `counts` is [layers, k, E] float64. A token that goes to two experts counts once for
    each. Layers without experts stay zero; padding is not counted."""

    num_layers: int
    num_domains: int
    num_experts: int
    device: torch.device
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.num_layers, self.num_domains, self.num_experts)
        self.counts = torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def add(self, layer: int, routed: Tensor, domain_ids: Tensor) -> None:
        """Count the tokens of one forward pass of one layer.

        Args:
            routed: [t, E], 1 or True where a token goes to an expert.
            domain_ids: [t] int64, -1 for padding.
        """
        if len(routed) != len(domain_ids):
            raise TrainingFault(f"a router of layer {layer} saw {len(routed)} tokens, the batch has {len(domain_ids)}")
        domains = torch.arange(self.num_domains, device=domain_ids.device)
        # A one-hot product rather than index_add, whose order of addition is not fixed on a GPU.
        one_hot = (domain_ids.unsqueeze(0) == domains.unsqueeze(1)).double()
        self.counts[layer] += one_hot @ routed.double()


def token_domains(batch: Batch) -> Tensor:
    """[b, S] int64: the domain of the sample that a position belongs to, -1 on padding."""
    domain_ids = batch.domain_ids[batch.segment_ids.clamp(min=0)]
    return torch.where(batch.segment_ids >= 0, domain_ids, -1)
