"""The same proportions for the whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, RelativeWeights
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import UpdateContext


@dataclass
class Static(Mixer):
    """Fixed proportions.

    Args:
        fixed: `proportions` in the configuration: [k] non-negative numbers in the order of the `dataset` key, taken
            relative to their sum. None: the proportions the run starts with.
    """

    fixed: Annotated[list[float] | None, RelativeWeights()] = field(default=None, metadata={"name": "proportions"})
    _proportions: tuple[float, ...] = field(default=(), init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Raises ConfigError when there is not one proportion for each domain."""
        proportions = domains.initial_proportions if self.fixed is None else tuple(self.fixed)
        if len(proportions) != len(domains):
            names = ", ".join(domains.names)
            raise ConfigError(
                f"mixer.static.proportions: {len(proportions)} numbers for {len(domains)} datasets ({names})"
            )
        self._proportions = proportions

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64, always the same."""
        proportions = torch.tensor(self._proportions, dtype=torch.float64)
        return proportions / proportions.sum()
