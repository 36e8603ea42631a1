"""Low or high scores at the beginning and at the end, everything else in between, each part in random order.

The default begins with the lowest tenth and ends with the highest. From the paper "Demystifying Data Organization for
Enhanced LLM Training".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Reorder
from dataflex_mega.errors import ConfigError


@dataclass
class Segment(Reorder):
    """Three parts, each shuffled.

    Args:
        x_pct: per cent of the samples in the first part, >= 0.
        y_pct: per cent in the last part, >= 0; x_pct + y_pct <= 100.
        front_is_high: whether the first part has the highest scores, else the lowest.
        back_is_high: whether the last part has the highest scores, else the lowest. Where both parts have the same ones,
            chance divides them.
    """

    x_pct: Annotated[float, Range(ge=0, le=100)] = 10.0
    y_pct: Annotated[float, Range(ge=0, le=100)] = 10.0
    front_is_high: bool = False
    back_is_high: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.x_pct + self.y_pct > 100:
            raise ConfigError(f"reorder.segment.y_pct: x_pct + y_pct must be <= 100, found {self.x_pct + self.y_pct}")

    def rank_order(self, count: int, seed: int) -> Tensor:
        """[count] int64. One Python generator shuffles the first part, the middle and the last part, in this order."""
        rng = random.Random(seed)
        num_front, num_back = int(count * self.x_pct // 100), int(count * self.y_pct // 100)
        ranks = list(range(count))
        if self.front_is_high == self.back_is_high:
            both, middle = _split_end(ranks, num_front + num_back, self.front_is_high)
            rng.shuffle(both)
            front, back = both[:num_front], both[num_front:]
        else:
            front, ranks = _split_end(ranks, num_front, self.front_is_high)
            back, middle = _split_end(ranks, num_back, self.back_is_high)
        for part in (front, middle, back):
            rng.shuffle(part)
        return torch.tensor(front + middle + back, dtype=torch.int64)


def _split_end(ranks: list[int], count: int, high: bool) -> tuple[list[int], list[int]]:
    """(`count` ranks from the high or the low end, the others)."""
    return (ranks[len(ranks) - count :], ranks[: len(ranks) - count]) if high else (ranks[:count], ranks[count:])
