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
    """At random, without regard to scores.

    Args:
        none; `seed` is the order's.
    """

    reads_scores: ClassVar[bool] = False

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64: Python's own shuffle of 0..count-1, so that a seed gives the order it gives in DataFlex."""
        places = list(range(count))
        random.Random(seed).shuffle(places)
        return torch.tensor(places, dtype=torch.int64)
