"""From the lowest score to the highest: the plain curriculum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder


@dataclass
class Sorting(Reorder):
    """Sorted by score.

    Args:
        none; `ascending` and `polarity` turn it around.
    """

    def rank_order(self, count: int, seed: int) -> Tensor:
        return torch.arange(count)
