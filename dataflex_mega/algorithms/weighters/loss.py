"""Sample weights from the losses of the batch.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining" (arXiv
2502.06733). Losses are mapped linearly to h in [-delta, delta] over the batch, a strategy f turns h into a preference,
and the weights are n * softmax(f(h) / r): mean 1, and the same for a * loss + b with any a > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import SampleStats

Strategy = Literal["linupper", "uniform", "quadratic", "extremes"]


def weights_from_losses(losses: Tensor, strategy: Strategy, delta: float = 1.0, r: float = 1.0) -> Tensor:
    """[n] losses -> [n] float64 weights with mean 1.

    A loss that is NaN or infinite gives weight 1 and does not influence the others. "linupper" favours high losses and
    treats those of the upper half alike, "quadratic" favours the middle, "extremes" both ends; "uniform" is exactly 1.
    """
    losses = losses.double()
    if strategy == "uniform" or len(losses) == 0:
        return torch.ones_like(losses)
    finite = torch.isfinite(losses)
    lowest = losses.masked_fill(~finite, math.inf).amin()
    width = losses.masked_fill(~finite, -math.inf).amax() - lowest
    # From the minimum, not from the middle: subtracting two large numbers would cancel where the range is small.
    h = torch.where(finite & (width > 0), delta * (2 * (losses - lowest) / width - 1), 0.0)
    if strategy == "linupper":
        preference = (h + delta).clamp(max=delta)
    elif strategy == "quadratic":
        preference = 1 - (h / delta) ** 2
    else:
        preference = h.abs()
    probabilities = torch.softmax((preference / r).masked_fill(~finite, -math.inf), dim=0)
    return torch.where(finite, probabilities * finite.sum(), 1.0)


@dataclass
class LossWeighter(Weighter):
    """Weights from losses.

    Args:
        strategy: which losses are favoured; see `weights_from_losses`.
        delta: half the width of the range losses are mapped to, > 0.
        r: the temperature of the softmax, > 0. Large is nearly uniform.
        r_start: the temperature at step 0, from which it moves linearly to r; None: r from the start. The paper
            anneals from a large one.
        anneal_steps: the number of steps of that move.
    """

    strategy: Strategy = "linupper"
    delta: Annotated[float, Range(gt=0)] = 1.0
    r: Annotated[float, Range(gt=0)] = 1.0
    r_start: Annotated[float | None, Range(gt=0)] = None
    anneal_steps: Annotated[int, Range(ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r_start is None) != (self.anneal_steps == 0):
            found = f"found r_start {self.r_start}, anneal_steps {self.anneal_steps}"
            raise ConfigError(f"weighter.loss.anneal_steps: must be >= 1 with r_start and 0 without it, {found}")

    def temperature(self, step: int) -> float:
        """r at a step, counted from 0."""
        if self.r_start is None:
            return self.r
        return self.r_start + (self.r - self.r_start) * min(1.0, step / self.anneal_steps)

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens has no loss: its weight is 1, and it influences no other."""
        losses = samples.loss.detach().masked_fill(samples.num_tokens == 0, math.nan)
        return weights_from_losses(losses, self.strategy, self.delta, self.temperature(step)).float()
