"""From low to high scores in sections, with repetition where one section goes over into the next.

Sorted by score, but around each border between S equal sections the samples come in layers, as with `folding`. From the
paper "Demystifying Data Organization for Enhanced LLM Training"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dataflex_mega.algorithms.base import Reorder, check_borders, layered_at_borders


@dataclass
class Stair(Reorder):
    """Sorted, and folded around the borders of sections.

    Args:
        num_sections: S >= 1.
        folding_ratio: share of all samples, on either side of a border, that is folded; 0 <= 2 * ratio < 1 / S. 0 is
            `sorting`.
        layers: L >= 1 of each of these stretches.
    """

    num_sections: int = 2
    folding_ratio: float = 0.0
    layers: int = 2

    def __post_init__(self) -> None:
        check_borders("reorder.stair", self.num_sections, self.folding_ratio, self.layers)

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64."""
        return layered_at_borders(count, self.num_sections, self.folding_ratio, self.layers, turning=False)
