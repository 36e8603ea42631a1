"""Three algorithms outside the package, a mixer, a selector and a weighter: a start for your own.

    PYTHONPATH=. dataflex-cli train examples/demo.yaml \
        'mixer={name: examples.plugins.my_algorithms:Curriculum, final: [1, 1, 1, 5], tokens: 500000}'
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range, RelativeWeights, Selector, Weighter
from dataflex_mega.algorithms.requests import LossSignal, Request
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import SampleStats, SignalTable, StepStats, UpdateContext


@dataclass
class Curriculum(Mixer):
    """A straight line from the initial proportions to final ones, paced by the tokens trained.

    Args:
        final: [k] where the line ends, taken relative to their sum.
        tokens: trained tokens after which the proportions are the final ones, >= 1.
    """

    final: Annotated[list[float], RelativeWeights()]
    tokens: Annotated[int, Range(ge=1)] = 1_000_000
    _seen: int = field(default=0, init=False, repr=False)
    _ends: tuple[Tensor, Tensor] = field(default=(torch.ones(1), torch.ones(1)), init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Raises ConfigError when there is not one number for each domain."""
        if len(self.final) != len(domains):
            raise ConfigError(f"mixer.Curriculum.final: {len(self.final)} numbers for {len(domains)} datasets")
        last = torch.tensor(self.final, dtype=torch.float64)
        self._ends = torch.tensor(domains.initial_proportions, dtype=torch.float64), last / last.sum()

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Count the tokens of all ranks."""
        self._seen += stats.num_tokens

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64, between the initial and the final proportions."""
        return torch.lerp(*self._ends, min(1.0, self._seen / self.tokens))

    def state_dict(self) -> dict[str, Any]:
        """The tokens seen; everything else is configuration."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = int(state["seen"])


@dataclass
class MiddleLoss(Selector):
    """The samples whose loss is nearest to the median: neither known already nor too hard.

    Args:
        quantile: of the losses, to which a sample's loss is compared; 0.5 is the median.
    """

    quantile: Annotated[float, Range(ge=0, le=1)] = 0.5

    def requests(self) -> tuple[Request, ...]:
        return (LossSignal(),)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 losses. `select` gets those of all ranks, so it can compute the median."""
        return table["loss"].float()

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions; ties go to the lower one. Raises DataError when too few losses are finite."""
        finite = torch.isfinite(scores)
        if count > int(finite.sum()):
            raise DataError(f"selector.MiddleLoss: {count} samples wanted, {int(finite.sum())} have a finite loss")
        ordered = scores[finite].sort().values
        target = ordered[round(self.quantile * (len(ordered) - 1))]
        distance = torch.where(finite, (scores - target).abs(), math.inf)
        return distance.sort(stable=True).indices[:count]


@dataclass
class Clipped(Weighter):
    """Weights in proportion to the loss, with both ends cut: w = c / mean(c), c = clip(L / mean(L), 1 / most, most).

    Args:
        most: bound on the ratio of a loss to the mean loss, >= 1; 1 gives all samples the same weight.
    """

    most: Annotated[float, Range(ge=1)] = 2.0

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens has no loss: its weight is 1, and it influences no other."""
        losses, known = samples.loss.double(), (samples.num_tokens > 0) & torch.isfinite(samples.loss_sum)
        weights = torch.ones_like(losses)
        mean = losses[known].mean()
        if bool(known.any()) and float(mean) > 0:
            clipped = (losses[known] / mean).clamp(1 / self.most, self.most)
            weights[known] = clipped / clipped.mean()
        return weights.float()
