"""New random proportions at every update: a control that a mixer has to beat."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Mixer
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Clock


@dataclass
class Random(Mixer):
    """Proportions from a symmetric Dirichlet distribution.

    Args:
        concentration: 1 draws uniformly from all proportions, larger stays nearer to equal shares, smaller nearer to a
            single domain. > 0.
        seed: other proportions with everything else kept; None: the run's seed alone decides.
    """

    concentration: float = 1.0
    seed: int | None = None
    _count: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.concentration) and self.concentration > 0):
            raise ConfigError(f"mixer.random.concentration: must be finite and > 0, found {self.concentration}")

    def setup(self, domains: Domains) -> None:
        """Notes the number of domains."""
        self._count = len(domains)

    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64: k Gamma(concentration) variables over their sum.

        In logarithms, with Gamma(a) = Gamma(a + 1) * U**(1 / a) (Marsaglia and Tsang 2000), because for small a all of
        them may underflow to 0.
        """
        word = int(torch.randint(2**62, (1,), generator=rng))
        source = random.Random(word if self.seed is None else f"{self.seed} {word}")
        a = self.concentration
        logs = [
            math.log(source.gammavariate(a + 1, 1.0)) + math.log1p(-source.random()) / a for _ in range(self._count)
        ]
        return torch.softmax(torch.tensor(logs, dtype=torch.float64), dim=0)
