"""Several passes from low to high scores, each over another part of the samples.

With the samples sorted by score, layer l of L holds those of rank l, l + L, l + 2 L, ...; the layers follow one another, so
the whole range of scores comes back L times. From the paper "Demystifying Data Organization for Enhanced LLM Training"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder, layered
from dataflex_mega.errors import ConfigError


@dataclass
class Folding(Reorder):
    """Layers one after another, each from low to high.

    Args:
        layers: how many, L >= 1. 1 is `sorting`.
    """

    layers: int = 5

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"reorder.folding.layers: must be >= 1, found {self.layers}")

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64."""
        return layered(torch.arange(count), self.layers, turning=False)
