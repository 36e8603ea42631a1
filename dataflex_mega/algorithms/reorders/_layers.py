"""What the patterns in layers share: layers over all samples, or around the borders between equal sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Reorder
from dataflex_mega.errors import ConfigError


def interleave(ranks: Tensor, layers: int, alternate_direction: bool) -> Tensor:
    """[n] -> [n]: every `layers`-th entry from the first on, then from the second on, and so on.

    `alternate_direction` reverses every other of these layers, so that one begins where the layer before it ended.
    """
    parts = [ranks[layer::layers] for layer in range(layers)]
    return torch.cat([part.flip(0) if alternate_direction and i % 2 else part for i, part in enumerate(parts)])


def fold_section_borders(
    count: int, num_sections: int, folding_ratio: float, layers: int, alternate_direction: bool
) -> Tensor:
    """[count] int64: 0, 1, 2, ... but interleaved within round(count * folding_ratio) positions of each border between
    equal sections. The folded stretches do not overlap while 2 * folding_ratio < 1 / num_sections."""
    ranks = torch.arange(count)
    radius = round(count * folding_ratio)
    for number in range(1, num_sections):
        border = round(count * number / num_sections)
        stretch = slice(max(border - radius, 0), min(border + radius, count))
        ranks[stretch] = interleave(ranks[stretch], layers, alternate_direction)
    return ranks


@dataclass
class LayeredReorder(Reorder):
    """Layers over all samples, one after another."""

    alternate_direction: ClassVar[bool]

    layers: Annotated[int, Range(ge=1)] = 5

    def rank_order(self, count: int, seed: int) -> Tensor:
        return interleave(torch.arange(count), self.layers, self.alternate_direction)


@dataclass
class SectionedReorder(Reorder):
    """Sorted, with layers around the borders between equal sections."""

    alternate_direction: ClassVar[bool]

    num_sections: Annotated[int, Range(ge=1)] = 2
    folding_ratio: float = 0.0
    layers: Annotated[int, Range(ge=1)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= 2 * self.folding_ratio < 1 / self.num_sections:
            bound = f"{0.5 / self.num_sections:g} with num_sections {self.num_sections}"
            raise ConfigError(
                f"reorder.{self._name()}.folding_ratio: must be >= 0 and below {bound}, found {self.folding_ratio}"
            )

    def rank_order(self, count: int, seed: int) -> Tensor:
        return fold_section_borders(count, self.num_sections, self.folding_ratio, self.layers, self.alternate_direction)
