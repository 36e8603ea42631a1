"""A random selection at every update: the control that a selector has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Selector
from dataflex_mega.errors import DataError
from dataflex_mega.types import SignalTable, UpdateContext


@dataclass
class RandomSelector(Selector):
    """Every candidate has the same chance.

    Args:
        seed: another selection with everything else unchanged; None: the run's seed alone decides.
        replacement: whether a candidate may be selected more than once.
    """

    seed: Annotated[int | None, Range(ge=0)] = None
    replacement: bool = False

    def score(self, table: SignalTable) -> Tensor:
        """[n] zeros: nothing is computed for the candidates."""
        return torch.zeros(len(table.sample_ids), dtype=torch.float32)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions. Raises DataError when count exceeds the candidates and none may be drawn twice."""
        candidates = len(scores)
        if count > candidates and (not self.replacement or candidates == 0):
            advice = "shorten update_step or set selector.random.replacement"
            raise DataError(f"selector.random: {count} samples wanted of {candidates} candidates; {advice}")
        if self.seed is not None:
            word = int(torch.randint(2**62, (1,), generator=rng))
            rng = torch.Generator().manual_seed(random.Random(f"{self.seed} {word}").getrandbits(63))
        if self.replacement:
            return torch.randint(max(candidates, 1), (count,), generator=rng)
        return torch.randperm(candidates, generator=rng)[:count]
