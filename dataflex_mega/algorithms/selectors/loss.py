"""Selects samples by their current loss: those of one loss range more often.

The range is the lowest, middle or highest part between two quantiles of all candidates' losses; its samples weigh
`focus_weight`, the others 1, and the chance of a sample is proportional to weight ** (1 / temperature). DataFlex's rule
(arXiv 2603.26164); it has no other paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Selector
from dataflex_mega.algorithms.requests import LossSignal, Request
from dataflex_mega.algorithms.selectors._sampling import draw_without_replacement
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import SignalTable, UpdateContext

Focus = Literal["low", "medium", "high"]
LARGEST_EXPONENT = 690.0  # exp of it and of its negative are normal float64 numbers


def quantile(ordered: Tensor, q: float) -> Tensor:
    """Quantile of an ascending [n] tensor, n >= 1, linear between neighbours; torch.quantile ends at 2**24 numbers."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


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
class LossSelector(Selector):
    """Chance by loss range.

    Args:
        focus: the range that is favoured: "low" up to the first quantile, "high" above the second, "medium" between.
        focus_weight: how much more a sample of that range weighs, > 0.
        quantiles: the two bounds, 0 <= first <= second <= 1.
        replacement: whether a candidate may be selected more than once.
        temperature: above 1 evens the chances out, below 1 sharpens them. > 0.
    """

    focus: Focus = "high"
    focus_weight: Annotated[float, Range(gt=0)] = 5.0
    quantiles: Annotated[tuple[float, float], Range(ge=0, le=1)] = (0.33, 0.66)
    replacement: bool = False
    temperature: Annotated[float, Range(gt=0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantiles[0] > self.quantiles[1]:
            found = list(self.quantiles)
            raise ConfigError(f"selector.loss.quantiles: must be 0 <= first <= second <= 1, found {found}")
        if abs(math.log(self.focus_weight)) / self.temperature > LARGEST_EXPONENT:
            found = f"found focus_weight {self.focus_weight}, temperature {self.temperature}"
            raise ConfigError(f"selector.loss.temperature: focus_weight ** (1 / temperature) is out of range, {found}")

    def requests(self) -> tuple[Request, ...]:
        return (LossSignal(),)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 losses, unchanged."""
        return table["loss"].float()

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions. Raises DataError when count exceeds the number of candidates with a finite loss."""
        chance = focus_weights(scores, self.focus, self.focus_weight, self.quantiles, self.temperature)
        possible = int((chance > 0).sum())
        if count > possible and (not self.replacement or possible == 0):
            found = f"{count} samples wanted of {len(scores)} candidates, {possible} with a finite loss"
            raise DataError(f"selector.loss: {found}; shorten update_step or set selector.loss.replacement")
        if self.replacement:
            bounds = chance.cumsum(0)
            points = torch.rand(count, generator=rng, dtype=torch.float64) * bounds[-1]
            last = int(chance.nonzero().max())  # rounding may put a point at the very end
            return torch.searchsorted(bounds, points, right=True).clamp(max=last)
        return draw_without_replacement(chance.log(), count, rng)
