"""New random proportions at every update: the control that a mixer has to beat."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.types import UpdateContext


@dataclass
class RandomMixer(Mixer):
    """Proportions from a symmetric Dirichlet distribution.

    Args:
        concentration: 1 draws uniformly from all proportions, larger stays nearer to equal proportions, smaller nearer to
            a single domain. > 0.
        seed: other proportions with everything else unchanged; None: the run's seed alone decides.
    """

    concentration: Annotated[float, Range(gt=0)] = 1.0
    seed: Annotated[int | None, Range(ge=0)] = None
    _num_domains: int = field(default=0, init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Record the number of domains."""
        self._num_domains = len(domains)

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: k Gamma(concentration) variables over their sum.

        In logarithms, with Gamma(a) = Gamma(a + 1) * U**(1 / a) (Marsaglia and Tsang 2000), because for small a all of
        them may underflow to 0.
        """
        word = int(torch.randint(2**62, (1,), generator=rng))
        source = random.Random(word if self.seed is None else f"{self.seed} {word}")
        a = self.concentration
        logs = [
            math.log(source.gammavariate(a + 1, 1.0)) + math.log1p(-source.random()) / a
            for _ in range(self._num_domains)
        ]
        return torch.softmax(torch.tensor(logs, dtype=torch.float64), dim=0)
