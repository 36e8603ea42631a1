"""From low to high scores in sections, with repetition where one section goes over into the next.

Sorted by score, but around each border between S equal sections the samples come in layers, as with `folding`. From the
paper "Demystifying Data Organization for Enhanced LLM Training".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dataflex_mega.algorithms.reorders._layers import SectionedReorder


@dataclass
class Stair(SectionedReorder):
    """Sorted, and folded around the borders of sections.

    Args:
        num_sections: S >= 1.
        folding_ratio: share of all samples, on either side of a border, that is folded; 0 <= 2 * ratio < 1 / S. 0 is
            `sorting`.
        layers: L >= 1 of each of these stretches.
    """

    alternate_direction: ClassVar[bool] = False
