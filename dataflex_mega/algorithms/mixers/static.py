"""The same proportions for the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Mixer
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Clock


@dataclass
class Static(Mixer):
    """Fixed proportions.

    Args:
        fixed: `proportions` in the configuration: [k] non-negative numbers in the order of the `dataset` key, taken
            relative to their sum. None: the proportions the run starts with.
    """

    fixed: list[float] | None = field(default=None, metadata={"name": "proportions"})
    _shares: tuple[float, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.fixed is None:
            return
        if not all(math.isfinite(x) and x >= 0 for x in self.fixed) or sum(self.fixed) <= 0:
            raise ConfigError(f"mixer.static.proportions: must be finite, >= 0 and not all 0, found {self.fixed}")

    def setup(self, domains: Domains) -> None:
        """Raises ConfigError when there is not one proportion for each domain."""
        given = domains.initial if self.fixed is None else tuple(self.fixed)
        if len(given) != len(domains):
            names = ", ".join(domains.names)
            raise ConfigError(f"mixer.static.proportions: {len(given)} numbers for {len(domains)} datasets ({names})")
        self._shares = given

    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64, always the same."""
        shares = torch.tensor(self._shares, dtype=torch.float64)
        return shares / shares.sum()
