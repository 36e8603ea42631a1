"""From the lowest score to the highest: the plain curriculum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder


@dataclass
class Sorting(Reorder):
    """By score.

    Args:
        none; `ascending` and `polarity` turn it around.
    """

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64: 0, 1, 2, ..."""
        return torch.arange(count)
