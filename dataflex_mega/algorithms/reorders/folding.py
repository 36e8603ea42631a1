"""Several passes from low to high scores, each over another part of the samples.

With the samples sorted by score, layer l of L holds those of rank l, l + L, l + 2 L, ...; the layers follow one another, so
the whole range of scores comes back L times. From the paper "Demystifying Data Organization for Enhanced LLM Training".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dataflex_mega.algorithms.reorders._layers import LayeredReorder


@dataclass
class Folding(LayeredReorder):
    """Layers one after another, each from low to high.

    Args:
        layers: how many, L >= 1. 1 is `sorting`.
    """

    alternate_direction: ClassVar[bool] = False
