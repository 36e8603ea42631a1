"""A random order, fixed by its seed: what any other order has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder


@dataclass
class Shuffle(Reorder):
    """A random order that ignores the scores.

    Args:
        none; `seed` is the order's.
    """

    uses_scores: ClassVar[bool] = False

    def rank_order(self, count: int, seed: int) -> Tensor:
        """[count] int64: Python's own shuffle of 0..count-1, so that a seed gives the order it gives in DataFlex."""
        ranks = list(range(count))
        random.Random(seed).shuffle(ranks)
        return torch.tensor(ranks, dtype=torch.int64)
