"""Where a mixture of experts sends the tokens of each domain, counted while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import Batch


@dataclass
class LoadSums:
    """Counts of one rank in one step. `total` is a [layers, k, E] float64 sum of (token, expert) pairs: a token that goes to
    two experts counts once for each. Layers without experts stay zero; padding is not counted."""

    layers: int
    domains: int
    experts: int
    device: torch.device
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.layers, self.domains, self.experts, dtype=torch.float64, device=self.device)

    def add(self, layer: int, chosen: Tensor, domain: Tensor) -> None:
        """Tokens of one forward pass of one layer.

        Args:
            chosen: [t, E], 1 or True where a token goes to an expert.
            domain: [t] int64, -1 for padding.
        """
        if len(chosen) != len(domain):
            raise TrainingFault(f"a router of layer {layer} saw {len(chosen)} tokens, the batch has {len(domain)}")
        # A one-hot product rather than index_add, whose order of addition is not fixed on a GPU.
        hot = (domain.unsqueeze(0) == torch.arange(self.domains, device=domain.device).unsqueeze(1)).double()
        self.total[layer] += hot @ chosen.double()


def token_domains(batch: Batch) -> Tensor:
    """[b, S] int64: the domain of the sample that a position belongs to, -1 on padding."""
    domain = batch.domain[batch.segment.clamp(min=0)]
    return torch.where(batch.segment >= 0, domain, -1)
