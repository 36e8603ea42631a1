"""From low to high scores in sections, with a zigzag where one section goes over into the next.

Sorted by score, but around each border between S equal sections the samples come in layers, by turns upwards and downwards,
as with `zigzag`. From the paper "Demystifying Data Organization for Enhanced LLM Training"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dataflex_mega.algorithms.base import Reorder, layered_at_borders
from dataflex_mega.errors import ConfigError


@dataclass
class Saw(Reorder):
    """Sorted, and in a zigzag around the borders of sections.

    Args:
        num_sections: S >= 1.
        folding_ratio: share of all samples, on either side of a border, that is in a zigzag; 0 <= 2 * ratio < 1 / S. 0 is
            `sorting`.
        layers: L >= 1 of each of these stretches.
    """

    num_sections: int = 2
    folding_ratio: float = 0.0
    layers: int = 2

    def __post_init__(self) -> None:
        for key in ("num_sections", "layers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"reorder.saw.{key}: must be >= 1, found {getattr(self, key)}")
        if not 0 <= 2 * self.folding_ratio < 1 / self.num_sections:
            most = f"{0.5 / self.num_sections:g} with num_sections {self.num_sections}"
            raise ConfigError(f"reorder.saw.folding_ratio: must be >= 0 and below {most}, found {self.folding_ratio}")

    def ranks(self, count: int, seed: int) -> Tensor:
        """[count] int64."""
        return layered_at_borders(count, self.num_sections, self.folding_ratio, self.layers, turning=True)
