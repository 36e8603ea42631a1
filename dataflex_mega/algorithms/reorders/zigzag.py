"""Passes over all scores, by turns upwards and downwards.

As `folding`, but every other layer runs from high to low, so that scores do not jump where a layer ends. From the paper
"Demystifying Data Organization for Enhanced LLM Training"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder, layered
from dataflex_mega.errors import ConfigError


@dataclass
class Zigzag(Reorder):
    """Layers one after another, by turns upwards and downwards.

    Args:
        layers: how many, L >= 1. 1 is `sorting`.
    """

    layers: int = 5

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"reorder.zigzag.layers: must be >= 1, found {self.layers}")

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64."""
        return layered(torch.arange(count), self.layers, turning=True)
