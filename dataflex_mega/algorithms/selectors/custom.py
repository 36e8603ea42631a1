"""The first samples of the pool: DataFlex's example of a custom selector, here so that its YAML files run.

Copy this file to start a selector of your own; `docs/add-an-algorithm.md` says how.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import DataError
from dataflex_mega.types import SignalTable, UpdateContext


@dataclass
class FirstNSelector(Selector):
    """The same first samples at every update.

    Args: none.
    """

    def score(self, table: SignalTable) -> Tensor:
        """[n] zeros: the order of the pool alone decides."""
        return torch.zeros(len(table.sample_ids), dtype=torch.float32)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64: 0..count-1. Raises DataError when count is more than there are candidates."""
        if count > len(scores):
            found = f"{count} samples wanted of {len(scores)} candidates"
            raise DataError(f"selector.custom: {found}; shorten update_step")
        return torch.arange(count)
