"""Passes over all scores, upwards and downwards in turn.

As `folding`, but every other layer runs from high to low, so that scores do not jump where a layer ends. From the paper
"Demystifying Data Organization for Enhanced LLM Training".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dataflex_mega.algorithms.reorders._layers import LayeredReorder


@dataclass
class Zigzag(LayeredReorder):
    """Layers one after another, upwards and downwards in turn.

    Args:
        layers: how many, L >= 1. 1 is `sorting`.
    """

    alternate_direction: ClassVar[bool] = True
