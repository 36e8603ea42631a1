"""Random draws with unequal chances."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_without_replacement(log_weights: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """[N] float64 logarithms, -inf for a chance of 0 -> [count] int64 positions, drawn one after the other.

    The largest of log weight + Gumbel noise are such a draw (Yellott 1977; Vieira 2014), in one sort and for any number of
    candidates. Ties go to the lower position.
    """
    uniform = torch.rand(len(log_weights), generator=rng, dtype=torch.float64)
    exponential = -torch.log1p(-uniform)  # minus its logarithm is Gumbel noise
    keys = torch.where(log_weights > -math.inf, log_weights - exponential.log(), -math.inf)
    return keys.sort(descending=True, stable=True).indices[:count]
