"""Samples by their current loss: those of one loss range are chosen more often.

The range is the lowest, middle or highest part between two quantiles of all candidates' losses; its samples weigh
`focus_weight`, the others 1, and the chance of a sample is proportional to weight ** (1 / temperature). DataFlex's rule
(arXiv 2603.26164); it has no other paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, SignalTable

Focus = Literal["low", "medium", "high"]
LARGEST_EXPONENT = 690.0  # exp of it and of its negative are normal float64 numbers


def quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile of an ascending [n] tensor, n >= 1, linear between neighbours; torch.quantile ends at 2**24 numbers."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def focus_weights(
    losses: Tensor, focus: Focus, focus_weight: float, quantiles: tuple[float, float], temperature: float
) -> Tensor:
    """[N] losses -> [N] float64 chances with sum 1; 0 for a loss that is NaN or infinite (all 0 when every one is)."""
    losses = losses.double()
    finite = torch.isfinite(losses)
    ordered = losses[finite].sort().values
    if len(ordered) == 0:
        return torch.zeros_like(losses)
    low, high = quantile(ordered, quantiles[0]), quantile(ordered, quantiles[1])
    inside = {"low": losses <= low, "medium": (losses > low) & (losses <= high), "high": losses > high}[focus]
    chance = torch.where(inside, focus_weight ** (1 / temperature), 1.0).double() * finite
    return chance / chance.sum()


@dataclass
class Loss(Selector):
    """Chance by loss range.

    Args:
        focus: the range that is favoured: "low" up to the first quantile, "high" above the second, "medium" between.
        focus_weight: how much more a sample of that range weighs, > 0.
        quantiles: the two bounds, 0 <= first <= second <= 1.
        replacement: whether a candidate may be chosen more than once.
        temperature: above 1 evens the chances out, below 1 sharpens them. > 0.
        cache_dir: where step_N.json of each selection goes; None: the output directory.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    focus: Focus = "high"
    focus_weight: float = 5.0
    quantiles: tuple[float, float] = (0.33, 0.66)
    replacement: bool = False
    temperature: float = 1.0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for key in ("focus_weight", "temperature"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"selector.loss.{key}: must be finite and > 0, found {value}")
        if not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            found = list(self.quantiles)
            raise ConfigError(f"selector.loss.quantiles: must be 0 <= first <= second <= 1, found {found}")
        if abs(math.log(self.focus_weight)) / self.temperature > LARGEST_EXPONENT:
            found = f"found focus_weight {self.focus_weight}, temperature {self.temperature}"
            raise ConfigError(f"selector.loss.temperature: focus_weight ** (1 / temperature) is out of range, {found}")

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: the losses themselves."""
        return table["loss"].float()

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] int64 positions.

        Without replacement: the largest of log chance + Gumbel noise, which is drawing one after the other (Yellott
        1977; Vieira 2014), in one sort and for any number of candidates. Ties go to the lower position.

        Raises DataError when count is more than there are candidates with a finite loss.
        """
        chance = focus_weights(scores, self.focus, self.focus_weight, self.quantiles, self.temperature)
        possible = int((chance > 0).sum())
        if count > possible and (not self.replacement or possible == 0):
            found = f"{count} samples wanted of {len(scores)} candidates, {possible} with a finite loss"
            raise DataError(f"selector.loss: {found}; shorten update_step or set selector.loss.replacement")
        if self.replacement:
            bounds = chance.cumsum(0)
            place = torch.rand(count, generator=rng, dtype=torch.float64) * bounds[-1]
            last = int(chance.nonzero().max())  # rounding may put a place at the very end
            return torch.searchsorted(bounds, place, right=True).clamp(max=last)
        uniform = torch.rand(len(scores), generator=rng, dtype=torch.float64)
        waiting = -torch.log1p(-uniform)  # exponential, so -log of it is Gumbel
        keys = torch.where(chance > 0, chance.log() - waiting.log(), -math.inf)
        return keys.sort(descending=True, stable=True).indices[:count]
